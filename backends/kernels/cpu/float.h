// Linears with floating-point weights of 8 and 4 bits: `linear.h` with other decodings, and scales of 16 weights.
//
// e4m3 becomes a float16 by shifts, 2^-8 of its value, whose subnormals cost nothing to widen; `unit` makes up for it.
// NaN is not kept: the caller sees to that. e2m1 is looked up as twice its value, which is an integer.
#pragma once
#include "linear.h"

namespace {

struct Float8 {
  static constexpr at::ScalarType type = at::kFloat8_e4m3fn;
  static constexpr int bytes = 32, scales = 1;
  static constexpr float offset = 0, unit = 256;
  static inline void block(const uint8_t* p, vf* out) {
#if defined(__AVX512F__)
    for (int i = 0; i < 2; ++i) out[i] = (vf)_mm512_cvtph_ps(half(p + i * 16));
#elif defined(__AVX2__) && defined(__F16C__)
    for (int i = 0; i < 2; ++i) {
      const __m256i h = half(p + i * 16);
      out[2 * i] = (vf)_mm256_cvtph_ps(_mm256_castsi256_si128(h));
      out[2 * i + 1] = (vf)_mm256_cvtph_ps(_mm256_extracti128_si256(h, 1));
    }
#else
    for (int i = 0; i < BLOCK; ++i) {
      const uint16_t bits = (p[i] & 0x80) << 8 | (p[i] & 0x7f) << 7;
      out[i / W][i % W] = static_cast<float>(c10::Half(bits, c10::Half::from_bits()));
    }
#endif
  }
#if defined(__AVX2__)
  static inline __m256i half(const uint8_t* p) {  // 16 bytes as float16
    const __m256i b = _mm256_cvtepu8_epi16(load<__m128i>(p));
    const __m256i size = _mm256_slli_epi16(_mm256_and_si256(b, _mm256_set1_epi16(0x7f)), 7);
    return _mm256_or_si256(_mm256_slli_epi16(_mm256_and_si256(b, _mm256_set1_epi16(0x80)), 8), size);
  }
#endif
};

template <int SCALES>
struct Float4 {
  static constexpr at::ScalarType type = at::kByte;
  static constexpr int bytes = 16, scales = SCALES;
  static constexpr float offset = 0, unit = 0.5;
  static inline void block(const uint8_t* p, vf* out) {
    alignas(16) static constexpr int8_t twice[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
    const v16 b = load<v16>(p);
    alignas(16) uint8_t values[BLOCK];
#if defined(__SSSE3__)
    const __m128i table = load<__m128i>(twice);
    _mm_store_si128(reinterpret_cast<__m128i*>(values), _mm_shuffle_epi8(table, (__m128i)(b & 15)));
    _mm_store_si128(reinterpret_cast<__m128i*>(values + 16), _mm_shuffle_epi8(table, (__m128i)(b >> 4)));
#else
    for (int i = 0; i < 16; ++i) values[i] = twice[b[i] & 15], values[i + 16] = twice[b[i] >> 4];
#endif
    for (int i = 0; i < V; ++i) out[i] = widen_signed(values + i * W);
  }
};

// What every byte stands for as an e4m3 or e8m0 scale.
struct ScaleTables {
  float e4m3[256], e8m0[256];
  ScaleTables() {
    for (int i = 0; i < 256; ++i) {
      const float size = (i & 0x7f) == 0x7f ? NAN : std::ldexp(1.f * ((i & 7) + (i & 0x78 ? 8 : 0)), ((i >> 3) & 15) - (i & 0x78 ? 10 : 9));
      e4m3[i] = i & 0x80 ? -size : size;
      e8m0[i] = i == 255 ? NAN : std::ldexp(1.f, i - 127);
    }
  }
};

at::Tensor float_linear(const at::Tensor& x, const at::Tensor& data, const at::Tensor& scale,
                        const std::optional<at::Tensor>& global_scale, const std::optional<at::Tensor>& bias) {
  static const ScaleTables tables;
  const float* const table = scale.scalar_type() == at::kFloat8_e4m3fn   ? tables.e4m3
                             : scale.scalar_type() == at::kFloat8_e8m0fnu ? tables.e8m0
                                                                          : nullptr;
  TORCH_CHECK(!global_scale || (table && global_scale->scalar_type() == at::kFloat && global_scale->numel() == 1),
              "a global scale is one float32 over scales of one byte");
  const float factor = global_scale ? 1.f / *global_scale->const_data_ptr<float>() : 1.f;
  if (data.scalar_type() != at::kByte) return linear<Float8>(x, data, &scale, nullptr, bias, table, factor);
  const bool halves = scale.dim() == 2 && scale.size(1) * 16 == x.size(-1);
  return halves ? linear<Float4<2>>(x, data, &scale, nullptr, bias, table, factor)
                : linear<Float4<1>>(x, data, &scale, nullptr, bias, table, factor);
}

TORCH_LIBRARY_IMPL(optimizer, CPU, m) { m.impl("float_linear", float_linear); }

}  // namespace
