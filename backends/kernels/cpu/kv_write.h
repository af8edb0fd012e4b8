// Elements of a key-value cache: how they are read, and `kv_write`, which rounds them and puts them in their slots.
//
// 8 bits are those of `optimizer.quant.kv`, to the bit: a head's values are divided by their largest / 127 or / 448,
// clamped, and rounded to the nearest, ties to even.
#pragma once
#include <torch/library.h>

#include <algorithm>

#include "float.h"

namespace {

// What an element of a cache is multiplied by to give its value: e4m3 is widened to 2^-8 of it.
template <typename E>
constexpr float unit = std::is_same_v<E, at::Float8_e4m3fn> ? Float8::unit : 1.f;

inline vf widen_half(const at::Half* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(load<__m256i>(p));
#elif defined(__AVX2__) && defined(__F16C__)
  return (vf)_mm256_cvtph_ps(load<__m128i>(p));
#else
  return widen(p);
#endif
}

// e4m3 as `Float8` decodes it, but its NaN is kept.
inline vf widen_e4m3(const at::Float8_e4m3fn* p) {
#if defined(__AVX2__) && defined(__F16C__)
  const auto* const from = reinterpret_cast<const __m128i*>(p);
  const __m128i bytes = W == 16 ? _mm_loadu_si128(from) : _mm_loadl_epi64(from);
  const __m256i h = Float8::half(reinterpret_cast<const uint8_t*>(&bytes));
  const __m256i size = _mm256_and_si256(h, _mm256_set1_epi16(0x7fff));
  const __m256i kept = _mm256_or_si256(h, _mm256_cmpeq_epi16(size, _mm256_set1_epi16(0x7f << 7)));
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(kept);
#else
  return (vf)_mm256_cvtph_ps(_mm256_castsi256_si128(kept));
#endif
#else
  vf v;
  for (int i = 0; i < W; ++i) v[i] = static_cast<float>(p[i]) / Float8::unit;
  return v;
#endif
}

// W elements of a cache or query in float32, in units of `unit`.
template <typename E>
inline vf elements(const E* p) {
  if constexpr (std::is_same_v<E, int8_t>) {
    return widen_signed(reinterpret_cast<const uint8_t*>(p));
  } else if constexpr (std::is_same_v<E, at::Float8_e4m3fn>) {
    return widen_e4m3(p);
  } else if constexpr (std::is_same_v<E, at::Half>) {
    return widen_half(p);
  } else {
    return widen(p);
  }
}

// The last `count < W` elements of a row, and zeros: what lies behind a row may not be memory.
template <typename E>
inline vf last_elements(const E* p, int64_t count) {
  alignas(E) uint8_t bytes[W * sizeof(E)] = {};
  std::memcpy(bytes, p, count * sizeof(E));
  return elements(reinterpret_cast<const E*>(bytes));
}

inline vu bits(const vf& v) { return load<vu>(&v); }

// Finite steps of at most 448 as e4m3 in the low byte of each lane. 20 bits of the mantissa are rounded away, and the
// exponent's bias goes from 127 to 7; below 2^-6 the step is 2^-9, the last place of 2^14.
inline vu e4m3(vf steps) {
  const vu size = bits(steps) & 0x7fffffffu;
  const vf magnitude = steps < 0 ? -steps : steps;
  const vu normal = ((size + 0x7ffffu + ((size >> 20) & 1u)) >> 20) - (120u << 3);
  const vu subnormal = bits(magnitude + 16384.f) - 0x46800000u;
  return (size < 0x3c800000u ? subnormal : normal) | ((bits(steps) >> 24) & 0x80u);
}

// One head of D values `x` to elements of type C, and their scale.
template <typename T, typename C>
void write_bytes(const void* from, int64_t d, void* to, float* scale) {
  constexpr bool fp8 = std::is_same_v<C, at::Float8_e4m3fn>;
  constexpr float limit = fp8 ? 448.f : 127.f;
  const T* const x = static_cast<const T*>(from);
  const auto read = [x, d](int64_t j) { return j + W <= d ? elements(x + j) : last_elements(x + j, d - j); };
  vu top = {};  // magnitudes as integers are in the same order, infinity and then NaN above all numbers
  for (int64_t j = 0; j < d; j += W) {
    const vu size = bits(read(j)) & 0x7fffffffu;
    top = size > top ? size : top;
  }
  uint32_t most = 0;
  for (int i = 0; i < W; ++i) most = std::max(most, static_cast<uint32_t>(top[i]));
  *scale = load<float>(&most) / limit;
  if (*scale == 0) *scale = 1;
  const vf zero = {}, high = zero + limit, low = zero - limit;
  for (int64_t j = 0; j < d; j += W) {
    vf steps = read(j) / *scale;
    steps = steps == steps ? steps : zero;
    steps = steps < low ? low : steps;
    steps = steps > high ? high : steps;
    // 1.5 * 2^23 has a last place of 1: adding it leaves an integer, rounded, in the low bits.
    const vu code = fp8 ? e4m3(steps) : bits(steps + 12582912.f);
    uint8_t bytes[W];
    for (int i = 0; i < W; ++i) bytes[i] = static_cast<uint8_t>(code[i]);
    const bool whole = j + W <= d;  // a copy of constant size is one instruction
    std::memcpy(static_cast<uint8_t*>(to) + j, bytes, whole ? W : d - j);
  }
}

template <typename T>
void write_same(const void* from, int64_t d, void* to, float*) {
  std::memcpy(to, from, d * sizeof(T));
}

typedef void Writer(const void* from, int64_t d, void* to, float* scale);

template <typename T>
Writer* writer_for(at::ScalarType cache) {
  return cache == at::kChar             ? write_bytes<T, int8_t>
         : cache == at::kFloat8_e4m3fn ? write_bytes<T, at::Float8_e4m3fn>
                                        : write_same<T>;
}

Writer* writer(at::ScalarType type, at::ScalarType cache) {
  switch (type) {
    case at::kFloat: return writer_for<float>(cache);
    case at::kBFloat16: return writer_for<at::BFloat16>(cache);
    case at::kHalf: return writer_for<at::Half>(cache);
    default: TORCH_CHECK(false, "kv_write takes float32, bfloat16 or float16; got ", type);
  }
}

inline void check_write(const char* name, const at::Tensor& x, const at::Tensor& cache,
                        const std::optional<at::Tensor>& scale, const at::Tensor& slots, bool any_float) {
  TORCH_CHECK(x.dim() == 4 && x.size(3) > 0, name, " must be [B, H_kv, S, D] with D of 1 or more; got ", x.sizes());
  TORCH_CHECK(cache.dim() == 4 && cache.size(1) == x.size(1) && cache.size(3) == x.size(3), name,
              "_cache must be [blocks, ", x.size(1), ", block_size, ", x.size(3), "]; got ", cache.sizes());
  const bool bytes = cache.scalar_type() == at::kChar || cache.scalar_type() == at::kFloat8_e4m3fn;
  const bool floats = any_float && (cache.scalar_type() == at::kFloat || cache.scalar_type() == at::kBFloat16 ||
                                    cache.scalar_type() == at::kHalf);
  TORCH_CHECK(bytes || floats || cache.scalar_type() == x.scalar_type(), name, "_cache must be ", x.scalar_type(),
              ", int8 or float8_e4m3fn; got ", cache.scalar_type());
  TORCH_CHECK(cache.stride(3) == 1, name, "_cache must have its last dimension contiguous; got ", cache.strides());
  TORCH_CHECK(scale.has_value() == bytes, name, "_scale goes with an 8-bit cache and no other; the cache is ",
              cache.scalar_type());
  TORCH_CHECK(!scale || (scale->scalar_type() == at::kFloat && scale->sizes() == cache.sizes().slice(0, 3) &&
                         scale->stride(2) == 1),
              name, "_scale must be float32 ", cache.sizes().slice(0, 3), ", its last dimension contiguous");
  TORCH_CHECK(slots.scalar_type() == at::kLong && slots.dim() == 2 && slots.size(0) == x.size(0) &&
                  slots.size(1) == x.size(2),
              "slots must be int64 [", x.size(0), ", ", x.size(2), "]; got ", slots.scalar_type(), " ", slots.sizes());
}

// Keys and values to write and what they go to; the caches are of the type of k, of 8 bits, or of any float where said.
inline void check_written(const at::Tensor& k, const at::Tensor& v, const at::Tensor& k_cache,
                          const at::Tensor& v_cache, const std::optional<at::Tensor>& k_scale,
                          const std::optional<at::Tensor>& v_scale, const at::Tensor& slots, bool any_float) {
  TORCH_CHECK(k.sizes() == v.sizes() && k.scalar_type() == v.scalar_type(), "v must be as k; got ", v.scalar_type(),
              " ", v.sizes());
  check_write("k", k, k_cache, k_scale, slots, any_float);
  check_write("v", v, v_cache, v_scale, slots, any_float);
  TORCH_CHECK(k_cache.sizes() == v_cache.sizes() && k_cache.scalar_type() == v_cache.scalar_type(),
              "v_cache must be as k_cache; got ", v_cache.scalar_type(), " ", v_cache.sizes());
}

// Write token s of row b of `x` to one slot, each head to its place.
inline void write_token(Writer* write, const at::Tensor& x, const at::Tensor& cache,
                        const std::optional<at::Tensor>& scale, int64_t b, int64_t s, int64_t slot) {
  const int64_t block = slot / cache.size(2), offset = slot % cache.size(2), bytes = x.element_size();
  const auto* from = static_cast<const uint8_t*>(x.const_data_ptr()) + (b * x.stride(0) + s * x.stride(2)) * bytes;
  auto* to = static_cast<uint8_t*>(cache.mutable_data_ptr()) +
             (block * cache.stride(0) + offset * cache.stride(2)) * cache.element_size();
  float* place = scale ? scale->mutable_data_ptr<float>() + block * scale->stride(0) + offset : nullptr;
  for (int64_t h = 0; h < x.size(1); ++h) {
    write(from + h * x.stride(1) * bytes, x.size(3), to + h * cache.stride(1) * cache.element_size(),
          scale ? place + h * scale->stride(1) : nullptr);
  }
}

void kv_write(const at::Tensor& k, const at::Tensor& v, const at::Tensor& k_cache, const at::Tensor& v_cache,
              const std::optional<at::Tensor>& k_scale, const std::optional<at::Tensor>& v_scale,
              const at::Tensor& slots) {
  check_written(k, v, k_cache, v_cache, k_scale, v_scale, slots, false);
  const auto inner = [](const at::Tensor& t) { return t.stride(3) == 1 ? t : t.contiguous(); };
  const at::Tensor kc = inner(k), vc = inner(v);
  Writer* const write = writer(k.scalar_type(), k_cache.scalar_type());
  const int64_t tokens = k.size(2), count = k_cache.size(0) * k_cache.size(2);
  const int64_t* const slot = slots.const_data_ptr<int64_t>();
  // A task has at least 64 KB to read: below that a second thread costs more than it brings.
  const int64_t grain = 1 + (64 << 10) / (1 + 2 * k.size(1) * k.size(3) * k.element_size());
  at::parallel_for(0, k.size(0) * tokens, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / tokens, s = i % tokens, place = slot[b * slots.stride(0) + s * slots.stride(1)];
      if (place < 0 || place >= count) continue;
      write_token(write, kc, k_cache, k_scale, b, s, place);
      write_token(write, vc, v_cache, v_scale, b, s, place);
    }
  });
}

TORCH_LIBRARY_IMPL(optimizer, CPU, m) { m.impl("kv_write", kv_write); }

}  // namespace
