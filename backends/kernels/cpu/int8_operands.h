// What products of int8 inputs and integer weights are made of: vectors of bytes, the dot product, the types of stored
// weights, and the rounding of inputs.
#pragma once
#include <limits>

#include "linear.h"
#include "tiles.h"

namespace {

#if defined(INT8_EMULATED_LANES)  // a vector of that many lanes without its instructions: tests of wider layouts
constexpr int LANES = INT8_EMULATED_LANES;
#elif defined(__AVX512VNNI__)
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#if defined(__AVX2__) && !defined(__AVXVNNI__)
#define INT8_AVX2
#endif
#endif
constexpr int CHUNK = LANES * 4;  // bytes
typedef int32_t vi __attribute__((vector_size(CHUNK)));
typedef float vl __attribute__((vector_size(CHUNK)));
typedef uint8_t vc __attribute__((vector_size(CHUNK)));

// acc[l] + sum of a[i] b[i] over the four bytes i of lane l, `a` unsigned and `b` signed: the loop below is vpdpbusd
// as its manual defines it. Products, at most 255 * 128, are added in 32 bits and nothing saturates (in vpdpbusds it
// would). No other code depends on VNNI.
inline vi multiply(vi acc, vc a, vc b) {
#if defined(__AVX512VNNI__) && !defined(INT8_EMULATED_LANES)
  return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)a, (__m512i)b);
#elif defined(__AVXVNNI__) && !defined(INT8_EMULATED_LANES)
  return (vi)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)a, (__m256i)b);
#else
  for (int i = 0; i < CHUNK; ++i) acc[i / 4] += a[i] * static_cast<int8_t>(b[i]);
  return acc;
#endif
}

// Hold a vector in a register. GCC would make it an operand in memory of each instruction that uses it, and load it anew
// for each: a Zen 4 core loads one vector of 64 bytes a cycle, so that it would wait for its loads.
template <typename T>
inline void hold(T& v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__AVX2__)
  asm("" : "+x"(v));
#endif
}

// A weight type: bytes of 32 weights, blocks in a chunk, the inputs that meet a chunk, the byte of zero weights and
// whether these decode to something else. `place` puts the 32 values of block i where the inputs of a chunk are.
struct Nibbles {
  typedef int8_t Input;
  static constexpr at::ScalarType type = at::kByte;
  static constexpr int bytes = 16, scales = 1, blocks = CHUNK / bytes, inputs = 2 * CHUNK;
  static constexpr uint8_t zero = 0x88;
  static constexpr bool offset = true;
  struct Operand {
    vc low, high;
  };
  typedef Operand Values;
  static inline Operand decode(const uint8_t* p) {
    vc b = load<vc>(p);
    hold(b);
    return {b & 15, b >> 4};
  }
  static inline Values values(const Input* x) {
    Values v{load<vc>(x), load<vc>(x + CHUNK)};
    hold(v.low), hold(v.high);
    return v;
  }
  static inline void place(const int8_t* q, int64_t i, Input* to) {  // all first halves, then all second halves
    std::memcpy(to + i * 16, q, 16);
    std::memcpy(to + CHUNK + i * 16, q + 16, 16);
  }
  static inline vi dot(vi acc, const Operand& w, const Values& x) {
#ifdef INT8_AVX2
    // vpmaddubsw adds two products in 16 bits and would saturate: 2 * 15 * 128 = 3840, and two of these 7680 < 32768.
    const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16((__m256i)w.low, (__m256i)x.low),
                                           _mm256_maddubs_epi16((__m256i)w.high, (__m256i)x.high));
    return acc + (vi)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
    return multiply(multiply(acc, w.low, x.low), w.high, x.high);
#endif
  }
};

#ifdef INT8_AVX2
struct Bytes {  // in 16 bits: vpmaddubsw would saturate, as 2 * 128 * 128 = 32768; vpmaddwd adds such a pair in 32 bits
  typedef int16_t Input;
  static constexpr at::ScalarType type = at::kChar;
  static constexpr int bytes = 32, scales = 1, blocks = 1, inputs = 32;
  static constexpr uint8_t zero = 0;
  static constexpr bool offset = false;
  struct Operand {
    __m256i low, high;
  };
  typedef Operand Values;
  static inline Operand decode(const uint8_t* p) {
    return {_mm256_cvtepi8_epi16(load<__m128i>(p)), _mm256_cvtepi8_epi16(load<__m128i>(p + 16))};
  }
  static inline void place(const int8_t* q, int64_t, Input* to) { std::copy(q, q + BLOCK, to); }
  static inline Values values(const Input* x) { return {load<__m256i>(x), load<__m256i>(x + 16)}; }
  static inline vi dot(vi acc, const Operand& w, const Values& x) {
    return acc + ((vi)_mm256_madd_epi16(w.low, x.low) + (vi)_mm256_madd_epi16(w.high, x.high));
  }
};
#else
struct Bytes {  // as q + 128
  typedef int8_t Input;
  static constexpr at::ScalarType type = at::kChar;
  static constexpr int bytes = 32, scales = 1, blocks = CHUNK / bytes, inputs = CHUNK;
  static constexpr uint8_t zero = 0;
  static constexpr bool offset = true;
  typedef vc Operand, Values;
  static inline Operand decode(const uint8_t* p) { return load<vc>(p) ^ 0x80; }
  static inline Values values(const Input* x) {
    vc v = load<vc>(x);
    hold(v);
    return v;
  }
  static inline void place(const int8_t* q, int64_t i, Input* to) { std::memcpy(to + i * BLOCK, q, BLOCK); }
  static inline vi dot(vi acc, const Operand& w, const Values& x) { return multiply(acc, w, x); }
};
#endif

// The scale of values, a multiple of 32 of them: largest / 127.5, epsilon for zeros, NaN where one is not finite.
inline float int8_step(const float* x, int64_t count) {
  typedef int32_t v4 __attribute__((vector_size(16)));
  vw top = {};  // magnitudes as integers have the order of floats, with infinity and NaN above them
  for (int64_t j = 0; j < count; j += W) {
    const vw size = load<vw>(x + j) & 0x7fffffff;
    top = size > top ? size : top;
  }
  v4 parts[W / 4];
  std::memcpy(parts, &top, sizeof(vw));
  for (int i = W / 8; i; i /= 2)
    for (int j = 0; j < i; ++j) parts[j] = parts[j + i] > parts[j] ? parts[j + i] : parts[j];
  const int32_t bits = std::max(std::max(parts[0][0], parts[0][1]), std::max(parts[0][2], parts[0][3]));
  float largest;
  std::memcpy(&largest, &bits, sizeof(float));
  const float s = (largest + (largest - largest)) / 127.5f;
  return s == 0 ? std::numeric_limits<float>::epsilon() : s;
}

// 32 values as integers under `step`, ties to even, zeros where it is NaN; returns their sum.
inline int32_t round_block(const float* x, float step, int8_t* to) {
  vf total = {};
  for (int i = 0; i < V; ++i) {
    vf v = load<vf>(x + i * W) / step;
    v = v > 127.f ? 127.f : v > -128.f ? v : -128.f;
    // 1.5 * 2^23 leaves no fraction bits: the sum is rounded to the nearest integer.
    const vf shifted = v + 12582912.f;
    const vs integers = __builtin_convertvector((vw)shifted - 0x4B400000, vs);
    std::memcpy(to + i * W, &integers, W);
    total += shifted - 12582912.f;
  }
  return static_cast<int32_t>(sum(total));  // at most 32 * 128: exact
}

}  // namespace
