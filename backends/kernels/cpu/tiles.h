// What the blocked GEMMs share: memory, units of four bytes put in order, weights fetched ahead, and results stored.
#pragma once
#include <utility>

#include "weights.h"

namespace {

template <typename T>
struct Buffer {  // zeros, aligned to a cache line
  struct alignas(64) Line {
    char bytes[64];
  };
  std::vector<Line> lines;
  explicit Buffer(int64_t count) : lines((count * sizeof(T) + 63) / 64) {}
  T* at(int64_t i) { return reinterpret_cast<T*>(lines.data()) + i; }
  const T* at(int64_t i) const { return reinterpret_cast<const T*>(lines.data()) + i; }
};

// Of vectors of 32-bit integers: lane l is lane F{}(l) of a, or of b where that is beyond a's last.
template <typename F, typename T, int... L>
inline T pick(T a, T b, std::integer_sequence<int, L...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, F{}(L)...);
#else
  return __builtin_shuffle(a, b, T{F{}(L)...});
#endif
}
template <typename F, typename T>
inline T pick(T a, T b, F) {
  return pick<F>(a, b, std::make_integer_sequence<int, sizeof(T) / 4>());
}

// Lane i of vector j becomes lane j of vector i.
template <int S = 1, typename T, int N>
inline void transpose(T (&v)[N]) {
  static_assert(sizeof(T) == N * 4);
  for (int i = 0; i < N; ++i) {
    if (i & S) continue;
    const T a = v[i], b = v[i + S];
    v[i] = pick(a, b, [](int l) { return l & S ? N + l - S : l; });
    v[i + S] = pick(a, b, [](int l) { return l & S ? N + l : l + S; });
  }
  if constexpr (2 * S < N) transpose<2 * S>(v);
}

// R rows of `count` units, one after the other, to [count, R]; rows from `held` on are zeros.
template <int R>
inline void interleave(const void* from, int64_t held, int64_t count, int32_t* to) {
  const auto at = [&](int64_t r, int64_t u) { return static_cast<const char*>(from) + (r * count + u) * 4; };
  int64_t u = 0;
  for (; u + W <= count; u += W, to += R * W) {
    vw v[R], zipped[R];
    for (int r = 0; r < R; ++r) v[r] = r < held ? load<vw>(at(r, u)) : vw{};
    for (int rows = 1; rows < R; rows *= 2) {  // units of `rows` rows are together
      for (int i = 0; i < R / 2; ++i) {
        zipped[2 * i] = pick(v[i], v[i + R / 2], [](int l) { return l / 2 + l % 2 * W; });
        zipped[2 * i + 1] = pick(v[i], v[i + R / 2], [](int l) { return l / 2 + l % 2 * W + W / 2; });
      }
      std::memcpy(v, zipped, sizeof(v));
    }
    std::memcpy(to, v, sizeof(v));
  }
  for (; u < count; ++u)
    for (int r = 0; r < R; ++r) *to++ = r < held ? load<int32_t>(at(r, u)) : 0;
}

// The weights of the next panel, fetched while this one is multiplied: tile t of `tiles` fetches its part in `steps`.
// With 128 rows, unpacking took 21 % of the time without it and takes 7 %; with 16 rows the whole is 1.7 times as fast.
struct Ahead {
  const uint8_t* next;
  int64_t stride;
  Ahead(const Weight& w, int64_t row_bytes, int64_t first, int64_t columns, int64_t t, int64_t tiles, int64_t steps) {
    const int64_t part = columns * row_bytes / tiles;
    next = w.data + std::min(first + columns, std::max<int64_t>(0, w.n - columns)) * row_bytes + t * part;
    stride = part / steps + 1;
  }
  void fetch() {
    __builtin_prefetch(next, 0, 2);
    next += stride;
  }
};

// Panels a task takes at least, of `products` each: a million take some 5 us, and a second thread as long to start.
inline int64_t panel_grain(int64_t products) { return std::max<int64_t>(1, (1 << 20) / products); }

// Round a vector of floats to T once, ties to even, and store at most `count` of its lanes.
template <typename T, typename F>
inline void store(T* to, F v, int64_t count) {
  constexpr int n = sizeof(F) / 4;
  typedef uint32_t bits __attribute__((vector_size(n * 4)));
  typedef uint16_t halves __attribute__((vector_size(n * 2)));
  T rounded[n];
  if constexpr (std::is_same_v<T, at::BFloat16>) {  // lane by lane it takes ten times as long
    const bits b = (bits)v, up = b + 0x7fff + ((b >> 16) & 1);
    const halves h = __builtin_convertvector((v == v ? up : bits{} + 0x7fc00000) >> 16, halves);
    std::memcpy(rounded, &h, sizeof(h));
  } else {
    for (int l = 0; l < n; ++l) rounded[l] = static_cast<T>(v[l]);
  }
  if (count >= n) {
    std::memcpy(to, rounded, sizeof(rounded));
  } else {
    std::memcpy(to, rounded, count * sizeof(T));
  }
}

// Floats to T, each rounded once.
template <typename T>
inline void narrow(const float* from, int64_t count, T* to) {
  int64_t i = 0;
  for (; i + W <= count; i += W) store(to + i, load<vf>(from + i), W);
  for (; i < count; ++i) to[i] = static_cast<T>(from[i]);
}

// The values of a contiguous tensor of one of the activation types, read and written in float32. A switch at each call
// costs nothing that can be measured, and a copy of a GEMM for each type would take seconds to compile.
struct Activations {
  at::ScalarType type;
  void* data;
  explicit Activations(const at::Tensor& t) : type(t.scalar_type()), data(const_cast<void*>(t.const_data_ptr())) {
    TORCH_CHECK(type == at::kFloat || type == at::kBFloat16 || type == at::kHalf,
                "activations must be float32, bfloat16 or float16");
  }
  template <typename F>
  void as_type(const F& run) const {
    if (type == at::kFloat) return run(static_cast<float*>(data));
    if (type == at::kBFloat16) return run(static_cast<at::BFloat16*>(data));
    run(static_cast<at::Half*>(data));
  }
  void read(int64_t from, int64_t count, float* to) const {  // `count` is a multiple of W
    as_type([&](const auto* p) {
      for (int64_t j = 0; j < count; j += W) store(to + j, widen(p + from + j), W);
    });
  }
  template <typename F>
  void write(int64_t to, F v, int64_t count) const {
    as_type([&](auto* p) { store(p + to, v, count); });
  }
};

}  // namespace
