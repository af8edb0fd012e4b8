// Stored weights of linears: their types, and the operands of one layer.
//
// int4 blocks of 32 weights are 16 bytes: byte i holds weight i (low) and i + 16 (high), stored as q + 8, so that a
// block decodes with one mask and one shift and activations need no shuffle.
#pragma once
#include "vector.h"

namespace {

// A weight type: what it is stored in, bytes of 32 weights, the scales these may have at most, what is taken off a
// decoded weight, what a unit of it stands for, and the decoding of 32 weights to V float vectors.
struct Int4 {
  static constexpr at::ScalarType type = at::kByte;
  static constexpr int bytes = 16, scales = 1;
  static constexpr float offset = 8, unit = 1;
  static inline void block(const uint8_t* p, vf* out) {
    v16 b = load<v16>(p);
    v16 parts[2] = {b & 15, b >> 4};
#if defined(__AVX512F__)
    for (int i = 0; i < 2; ++i) out[i] = (vf)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32((__m128i)parts[i]));
#elif defined(__AVX2__)
    for (int i = 0; i < 2; ++i) {
      out[2 * i] = (vf)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32((__m128i)parts[i]));
      out[2 * i + 1] = (vf)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128((__m128i)parts[i], 8)));
    }
#else
    for (int i = 0; i < V; ++i)
      out[i] = __builtin_convertvector(load<vb>(reinterpret_cast<uint8_t*>(parts) + i * W), vf);
#endif
  }
};
struct Int8 {
  static constexpr at::ScalarType type = at::kChar;
  static constexpr int bytes = 32, scales = 1;
  static constexpr float offset = 0, unit = 1;
  static inline void block(const uint8_t* p, vf* out) {
    for (int i = 0; i < V; ++i) out[i] = widen_signed(p + i * W);
  }
};
struct BFloat16 {
  static constexpr at::ScalarType type = at::kBFloat16;
  static constexpr int bytes = 64, scales = 1;
  static constexpr float offset = 0, unit = 1;
  static inline void block(const uint8_t* p, vf* out) {
    for (int i = 0; i < V; ++i) out[i] = widen_bfloat16(p + i * W * 2);
  }
};

struct Weight {
  const uint8_t* data;  // [N, K / 32 * bytes]
  const float* scale;   // [N, G] or null: all ones
  const float* zero;    // [N, G] or null: all zeros, in units of q
  const float* bias;    // [N] or null
  int64_t n, k, groups;
  const uint8_t* codes = nullptr;  // [N, G]: scales of one byte, looked up in `table` and multiplied by `factor`
  const float* table = nullptr;
  float factor = 1;
  float scale_at(int64_t i) const { return codes ? table[codes[i]] * factor : scale ? scale[i] : 1.f; }
};

}  // namespace
