// Linears whose inputs are rounded to int8: dot products of integers, exact in int32 under one scale, else float32.
//
// A CHUNK is one vector of stored weights. Inputs are rounded once for all output rows and laid out in the order in
// which a chunk decodes, so the inner loop shuffles nothing: load, decode, multiply. A RUN is a number of chunks whose
// products share their scales, or one chunk whose lanes have different ones; integers are summed over a run. Every lane
// of a vector holds weights of one block of 32 only, so scales of 32 values are a vector of scales.
//
// Weights may be decoded with an offset (q + 8, q + 128), because the instructions want one unsigned factor. What a
// zero weight would contribute is computed from the inputs, once, and every sum starts at its negative.
#pragma once
#include <limits>
#include <numeric>

#include "linear.h"
#include "vector.h"

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
  static inline Operand decode(const uint8_t* p) {
    const vc b = load<vc>(p);
    return {b & 15, b >> 4};
  }
  static inline void place(const int8_t* q, int64_t i, Input* to) {  // all first halves, then all second halves
    std::memcpy(to + i * 16, q, 16);
    std::memcpy(to + CHUNK + i * 16, q + 16, 16);
  }
  static inline vi dot(vi acc, const Operand& w, const Input* x) {
    const vc low = load<vc>(x), high = load<vc>(x + CHUNK);
#ifdef INT8_AVX2
    // vpmaddubsw adds two products in 16 bits and would saturate: 2 * 15 * 128 = 3840, and two of these 7680 < 32768.
    const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16((__m256i)w.low, (__m256i)low),
                                           _mm256_maddubs_epi16((__m256i)w.high, (__m256i)high));
    return acc + (vi)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
    return multiply(multiply(acc, w.low, low), w.high, high);
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
  static inline Operand decode(const uint8_t* p) {
    return {_mm256_cvtepi8_epi16(load<__m128i>(p)), _mm256_cvtepi8_epi16(load<__m128i>(p + 16))};
  }
  static inline void place(const int8_t* q, int64_t, Input* to) { std::copy(q, q + BLOCK, to); }
  static inline vi dot(vi acc, const Operand& w, const Input* x) {
    return acc + ((vi)_mm256_madd_epi16(w.low, load<__m256i>(x)) +
                  (vi)_mm256_madd_epi16(w.high, load<__m256i>(x + 16)));
  }
};
#else
struct Bytes {  // as q + 128
  typedef int8_t Input;
  static constexpr at::ScalarType type = at::kChar;
  static constexpr int bytes = 32, scales = 1, blocks = CHUNK / bytes, inputs = CHUNK;
  static constexpr uint8_t zero = 0;
  static constexpr bool offset = true;
  typedef vc Operand;
  static inline Operand decode(const uint8_t* p) { return load<vc>(p) ^ 0x80; }
  static inline void place(const int8_t* q, int64_t i, Input* to) { std::memcpy(to + i * BLOCK, q, BLOCK); }
  static inline vi dot(vi acc, const Operand& w, const Input* x) { return multiply(acc, w, load<vc>(x)); }
};
#endif

constexpr int64_t SLAB = 128 << 10;         // bytes of weights that serve all rows before the next: a part of L2
constexpr int64_t AHEAD = 1024;             // bytes of weights fetched ahead of the next rows
constexpr int64_t MOST_FEATURES = 1 << 18;  // K / LANES products of at most 255 * 128 and their start are below 2^31

// How K is cut. `share` blocks have one input scale, `step` chunks one weight scale; where a chunk has several weight
// scales, `scale_of` is that of each of its blocks (of the last one, for blocks beyond K).
struct Cut {
  int64_t blocks, chunks, share, run, runs, step;
  std::vector<int64_t> scale_of;
  template <typename F>
  static Cut of(const Weight& w, int64_t group) {
    Cut c;
    c.blocks = w.k / BLOCK, c.chunks = (c.blocks + F::blocks - 1) / F::blocks;
    c.share = group < 0 ? c.blocks : group / BLOCK;
    const int64_t scaled = c.blocks / w.groups, common = std::gcd(c.share, scaled);
    c.run = common == c.blocks ? c.chunks : common % F::blocks ? 1 : common / F::blocks;
    c.runs = c.chunks / c.run;
    c.step = w.groups == 1 ? c.chunks : scaled / F::blocks;
    if (w.groups == 1 || scaled % F::blocks == 0) return c;
    c.step = 1;
    for (int64_t b = 0; b < c.chunks * F::blocks; ++b) c.scale_of.push_back(std::min(b, c.blocks - 1) / scaled);
    return c;
  }
};

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

template <typename F>
inline void set_block(vl& lanes, int i, float value) {  // the lanes of block i of a chunk
  constexpr int n = LANES / F::blocks;
  for (int l = 0; l < n; ++l) lanes[i * n + l] = value;
}

// Inputs [M, K] as integers and scales.
template <typename F>
struct Inputs {
  const Cut& cut;
  Buffer<typename F::Input> q;  // [M, chunks, F::inputs]
  Buffer<int32_t> start;        // [M, runs, LANES]: minus what zero weights would give
  Buffer<float> scale;          // [M, runs, LANES]
  Buffer<float> total;          // [M, G]: of the inputs under one weight scale; only where there are zero points
  int64_t groups;
  Inputs(const Weight& w, const Cut& c, int64_t m)
      : cut(c), q(m * c.chunks * F::inputs), start(m * c.runs * LANES), scale(m * c.runs * LANES),
        total(w.zero ? m * w.groups : 0), groups(w.zero ? w.groups : 0) {}

  // The scale of values: largest / 127.5, epsilon for zeros, NaN where a value is not finite.
  static float step(const float* x, int64_t count) {
    vf top = {}, poison = {};
    for (int64_t j = 0; j < count; j += W) {
      const vf v = load<vf>(x + j), size = v < 0 ? -v : v;
      top = size > top ? size : top;
      poison += v * 0.f;
    }
    float largest = sum(poison);
    for (int i = 0; i < W; ++i) largest = top[i] > largest ? top[i] : largest;
    const float s = largest / 127.5f;
    return s == 0 ? std::numeric_limits<float>::epsilon() : s;
  }

  void round(const float* x, int64_t m) {
    std::vector<float> steps(cut.blocks);  // of each block, so that only this loop divides
    typename F::Input* const row = q.at(m * cut.chunks * F::inputs);
    for (int64_t b = 0; b < cut.blocks; b += cut.share)
      std::fill_n(&steps[b], cut.share, step(x + b * BLOCK, cut.share * BLOCK));
    for (int64_t b = 0; b < cut.blocks; ++b) {
      int8_t values[BLOCK];
      for (int i = 0; i < V; ++i) {
        vf v = load<vf>(x + b * BLOCK + i * W) / steps[b];
        v = v == v ? v : 0.f;
        v = v > 127.f ? 127.f : v < -128.f ? -128.f : v;
        // 1.5 * 2^23 leaves no fraction bits: the sum is rounded to the nearest integer, ties to even.
        const vf shifted = v + 12582912.f;
        const vs integers = __builtin_convertvector((vw)shifted - 0x4B400000, vs);
        std::memcpy(values + i * W, &integers, W);
      }
      F::place(values, b % F::blocks, row + b / F::blocks * F::inputs);
      if (groups)
        *total.at(m * groups + b * groups / cut.blocks) += steps[b] * std::accumulate(values, values + BLOCK, 0);
    }
    uint8_t zeros[CHUNK];
    std::fill(zeros, zeros + CHUNK, F::zero);
    const auto nothing = F::decode(zeros);
    for (int64_t r = 0; r < cut.runs; ++r) {
      vi given = {};
      vl lanes;
      for (int64_t c = r * cut.run; c < (r + 1) * cut.run; ++c) given = F::dot(given, nothing, row + c * F::inputs);
      for (int i = 0; i < F::blocks; ++i)
        set_block<F>(lanes, i, steps[std::min(r * cut.run * F::blocks + i, cut.blocks - 1)]);
      given = -given;
      std::memcpy(start.at((m * cut.runs + r) * LANES), &given, sizeof(vi));
      std::memcpy(scale.at((m * cut.runs + r) * LANES), &lanes, sizeof(vl));
    }
  }
};

// The sum of scale * zero * inputs over the groups of one output: what zero points take off.
inline float zero_share(const float* scale, const float* zero, const float* total, int64_t groups) {
  vf sums = {};
  int64_t g = 0;
  for (; g + W <= groups; g += W) sums += load<vf>(scale + g) * load<vf>(zero + g) * load<vf>(total + g);
  float rest = sum(sums);
  for (; g < groups; ++g) rest += scale[g] * zero[g] * total[g];
  return rest;
}

enum class Scales { run, chunk, fine };  // the same for several chunks; for one; several weight scales in a chunk

// M input rows by R output rows: out[m, n] for m < M and n in [first, min(first + R, end)).
template <typename F, int M, int R, Scales S>
void block_product(const Weight& w, const uint8_t* last, const Inputs<F>& x, int64_t row, int64_t first, int64_t end,
                   float* out) {
  const Cut& cut = x.cut;
  const typename F::Input* q[M];
  const int32_t* start[M];
  const float *scale[M], *weight_scale[R];
  const uint8_t* p[R];
  for (int m = 0; m < M; ++m) {
    q[m] = x.q.at((row + m) * cut.chunks * F::inputs);
    start[m] = x.start.at((row + m) * cut.runs * LANES);
    scale[m] = x.scale.at((row + m) * cut.runs * LANES);
  }
  for (int r = 0; r < R; ++r) {
    const int64_t n = std::min(first + r, end - 1);
    p[r] = n + 1 == w.n ? last : w.data + n * cut.blocks * F::bytes;
    weight_scale[r] = w.scale + n * w.groups;
  }
  // The rows of the next call follow these in memory. Fetched in that order, cold weights arrive at the bandwidth of a
  // plain read; two interleaved streams left to the processor reached 40 % of that.
  const int64_t ahead = R * cut.blocks * F::bytes + AHEAD;
  vl total[M][R] = {};
  for (int64_t c = 0, run = 0, g = 0; c < cut.chunks; ++g) {
    vl s[R] = {};
    for (int r = 0; r < R; ++r) {
      if constexpr (S == Scales::fine) {
        for (int i = 0; i < F::blocks; ++i) set_block<F>(s[r], i, weight_scale[r][cut.scale_of[c * F::blocks + i]]);
      } else {
        s[r] = vl{} + weight_scale[r][g];
      }
    }
    vl part[M][R] = {};
    for (const int64_t stop = c + cut.step; c < stop; ++run) {
      vi acc[M][R];
      for (int m = 0; m < M; ++m)
        for (int r = 0; r < R; ++r) acc[m][r] = F::offset ? load<vi>(start[m] + run * LANES) : vi{};
      for (const int64_t until = c + (S == Scales::run ? cut.run : 1); c < until; ++c)
        for (int r = 0; r < R; ++r) {
          if constexpr (M <= 2) __builtin_prefetch(p[0] + ahead + (c * R + r) * CHUNK);
          const auto weights = F::decode(p[r] + c * CHUNK);
          for (int m = 0; m < M; ++m) {
            acc[m][r] = F::dot(acc[m][r], weights, q[m] + c * F::inputs);
            if constexpr (S != Scales::run)  // at once, while it is in a register
              part[m][r] += __builtin_convertvector(acc[m][r], vl) * load<vl>(scale[m] + run * LANES);
          }
        }
      if constexpr (S == Scales::run)
        for (int m = 0; m < M; ++m)
          for (int r = 0; r < R; ++r)
            part[m][r] += __builtin_convertvector(acc[m][r], vl) * load<vl>(scale[m] + run * LANES);
    }
    for (int m = 0; m < M; ++m)
      for (int r = 0; r < R; ++r) total[m][r] += part[m][r] * s[r];
  }
  for (int64_t r = 0, n = first; r < R && n < end; ++r, ++n) {
    for (int m = 0; m < M; ++m) {
      float y = sum(total[m][r]);
      if (w.zero) y -= zero_share(weight_scale[r], w.zero + n * w.groups, x.total.at((row + m) * w.groups), w.groups);
      out[(row + m) * w.n + n] = y + (w.bias ? w.bias[n] : 0.f);
    }
  }
}

template <typename F, Scales S>
void product(const Weight& w, const Inputs<F>& x, int64_t m, float* out) {
  const int64_t bytes = x.cut.blocks * F::bytes, padded = x.cut.chunks * CHUNK;
  Buffer<uint8_t> last(padded);  // the last row, whose last chunk may end beyond the weight
  std::memcpy(last.at(0), w.data + (w.n - 1) * bytes, bytes);
  const int64_t grain = std::max<int64_t>(1, (64 << 10) / bytes), slab = std::max<int64_t>(2, SLAB / bytes & ~1);
  at::parallel_for(0, w.n, grain, [&](int64_t begin, int64_t stop) {
    for (int64_t from = begin; from < stop; from += slab) {
      const int64_t end = std::min(from + slab, stop);
      int64_t i = 0;
      for (; i + 4 <= m; i += 4)
        for (int64_t n = from; n < end; n += 2) block_product<F, 4, 2, S>(w, last.at(0), x, i, n, end, out);
      for (; i + 2 <= m; i += 2)
        for (int64_t n = from; n < end; n += 2) block_product<F, 2, 2, S>(w, last.at(0), x, i, n, end, out);
      for (; i < m; ++i)
        for (int64_t n = from; n < end; n += 2) block_product<F, 1, 2, S>(w, last.at(0), x, i, n, end, out);
    }
  });
}

template <typename F>
at::Tensor int8_linear(const at::Tensor& x, const at::Tensor& data, const at::Tensor& scale,
                       const std::optional<at::Tensor>& zero, const std::optional<at::Tensor>& bias, int64_t group) {
  const at::Tensor xc = x.contiguous(), bc = bias ? bias->contiguous() : at::Tensor();  // outlive their Floats
  const Floats xf(xc), bf(bc);
  const Weight w = checked<F>(x, data, &scale, zero ? &*zero : nullptr, bias, bf.data);
  TORCH_CHECK(group == -1 || (group > 0 && group % BLOCK == 0 && w.k % group == 0), "inputs cannot be rounded in ",
              "groups of ", group, ": use -1, or a multiple of ", BLOCK, " that divides ", w.k);
  TORCH_CHECK(w.k <= MOST_FEATURES, w.k, " features could overflow a sum in 32 bits; at most ", MOST_FEATURES);
  auto shape = x.sizes().vec();
  shape.back() = w.n;
  at::Tensor out = at::empty(shape, x.options());
  const int64_t m = x.numel() / w.k;
  if (out.numel() == 0) return out;
  const Cut cut = Cut::of<F>(w, group);
  Inputs<F> inputs(w, cut, m);
  at::parallel_for(0, m, std::max<int64_t>(1, (64 << 10) / w.k), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) inputs.round(xf.data + i * w.k, i);
  });
  const auto run = !cut.scale_of.empty() ? product<F, Scales::fine>
                   : cut.run > 1         ? product<F, Scales::run>
                                         : product<F, Scales::chunk>;
  if (x.scalar_type() == at::kFloat) {
    run(w, inputs, m, out.mutable_data_ptr<float>());
  } else if (m >= GEMM_ROWS) {
    const at::Tensor wide = at::empty(shape, x.options().dtype(at::kFloat));
    run(w, inputs, m, wide.mutable_data_ptr<float>());
    out.copy_(wide);
  } else {  // a decode step: two calls of ATen would take longer than the conversion
    std::vector<float> wide(m * w.n);
    run(w, inputs, m, wide.data());
    WITH_REDUCED_TYPE(out, for (int64_t i = 0; i < m * w.n; ++i) to[i] = static_cast<T>(wide[i]));
  }
  return out;
}

at::Tensor dynamic_int8_linear(const at::Tensor& x, const at::Tensor& data, const at::Tensor& scale,
                               const std::optional<at::Tensor>& zero, const std::optional<at::Tensor>& bias,
                               int64_t group) {
  return data.scalar_type() == at::kByte ? int8_linear<Nibbles>(x, data, scale, zero, bias, group)
                                         : int8_linear<Bytes>(x, data, scale, zero, bias, group);
}

TORCH_LIBRARY_IMPL(optimizer, CPU, m) { m.impl("dynamic_int8_linear", dynamic_int8_linear); }

}  // namespace
