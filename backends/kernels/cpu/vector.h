// What the CPU kernels share: vectors, their loads and widening, and the values of a tensor in float32.
//
// Vectors are GCC vector extensions, so one source serves AVX2, AVX-512 and NEON. Activations are widened to float32
// once, products are accumulated in float32 and rounded once to the activation type.
#pragma once
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <cmath>
#include <cstring>
#include <vector>
#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace {

#ifdef __AVX512F__
constexpr int W = 16;
#else
constexpr int W = 8;
#endif
constexpr int BLOCK = 32;
constexpr int V = BLOCK / W;       // vectors in a block
typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vw __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint8_t vb __attribute__((vector_size(W)));
typedef int8_t vs __attribute__((vector_size(W)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));
typedef uint8_t v16 __attribute__((vector_size(16)));

template <typename T>
inline T load(const void* p) {
  T v;
  std::memcpy(&v, p, sizeof(T));
  return v;
}

// Widening a byte vector: GCC 12 scalarizes __builtin_convertvector from 8 bits, which costs a factor of five.
inline vf widen_signed(const uint8_t* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load<__m128i>(p)));
#elif defined(__AVX2__)
  return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  return __builtin_convertvector(load<vs>(p), vf);
#endif
}
inline vf widen_bfloat16(const uint8_t* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(load<__m256i>(p)), 16);
#elif defined(__AVX2__)
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(load<__m128i>(p)), 16);
#else
  vu bits = __builtin_convertvector(load<vh>(p), vu) << 16;
  return load<vf>(&bits);
#endif
}

// The sum of a vector of floats, by halves: a chain of additions would take longer than a short row of weights.
template <typename T>
inline float sum(const T& v) {
  typedef float v4 __attribute__((vector_size(16)));
  v4 parts[sizeof(T) / sizeof(v4)];
  std::memcpy(parts, &v, sizeof(T));
  for (size_t i = 1; i < sizeof(T) / sizeof(v4); ++i) parts[0] += parts[i];
  return (parts[0][0] + parts[0][2]) + (parts[0][1] + parts[0][3]);
}

// A vector of elements of type T, widened to float32 as it is read.
template <typename T>
inline vf widen(const T* p) {
  if constexpr (std::is_same_v<T, float>) {
    return load<vf>(p);
  } else if constexpr (std::is_same_v<T, at::BFloat16>) {
    return widen_bfloat16(reinterpret_cast<const uint8_t*>(p));
  } else {
    vf v;
    for (int i = 0; i < W; ++i) v[i] = static_cast<float>(p[i]);
    return v;
  }
}

// Run `body` with T and `to`, a pointer into `t`, for the two 16-bit floating types.
#define WITH_REDUCED_TYPE(t, body)                                                   \
  if ((t).scalar_type() == at::kBFloat16) {                                            \
    using T = at::BFloat16;                                                            \
    T* to = static_cast<T*>(const_cast<void*>((t).const_data_ptr()));                                   \
    body;                                                                              \
  } else {                                                                             \
    TORCH_CHECK((t).scalar_type() == at::kHalf, "activations must be float32, bfloat16 or float16"); \
    using T = at::Half;                                                                \
    T* to = static_cast<T*>(const_cast<void*>((t).const_data_ptr()));                                   \
    body;                                                                              \
  }

// A contiguous tensor's values in float32: in place when they are, widened into a buffer otherwise. No dispatcher:
// a decode step calls this for every layer, and two ATen calls would cost more than the widening.
struct Floats {
  const float* data = nullptr;
  std::vector<float> wide;
  explicit Floats(const at::Tensor& t) {
    if (!t.defined()) return;
    if (t.scalar_type() == at::kFloat) {
      data = t.const_data_ptr<float>();
      return;
    }
    wide.resize(t.numel());
    WITH_REDUCED_TYPE(t, for (int64_t i = 0; i < t.numel(); ++i) wide[i] = static_cast<float>(to[i]));
    data = wide.data();
  }
  Floats(const Floats&) = delete;
};

}  // namespace
