// Linears whose inputs are rounded to int8: dot products of integers, exact in int32 under one scale, else float32.
//
// A CHUNK is one vector of stored weights. Inputs are rounded once for all output rows and laid out in the order in
// which a chunk decodes, so the inner loop shuffles nothing: load, decode, multiply. A RUN is a number of chunks whose
// products share their scales, or one chunk whose lanes have different ones; integers are summed over a run. Every lane
// of a vector holds weights of one block of 32 only, so scales of 32 values are a vector of scales.
//
// Many rows are a GEMM of another order (int8_gemm.h) where there is VNNI.
//
// Weights may be decoded with an offset (q + 8, q + 128), because the instructions want one unsigned factor. What a
// zero weight would contribute is computed from the inputs, once, and every sum starts at its negative.
#pragma once
#include <numeric>

#include "int8_gemm.h"
#include "int8_operands.h"

namespace {

constexpr int64_t SLAB = 128 << 10;         // bytes of weights that serve all rows before the next: a part of L2
constexpr int64_t AHEAD = 4096;             // bytes of weights fetched ahead of the next rows
constexpr int64_t MOST_FEATURES = 1 << 18;  // K / LANES products of at most 255 * 128 and their start are below 2^31

// How K is cut. `share` blocks have one input scale; `first[r]` is the weight scale of run r, the one of its first block
// where its blocks have several: `lane[r]` then says how far from it that of each lane is.
struct Cut {
  int64_t blocks, chunks, share, run, runs;
  bool fine;
  std::vector<int32_t> first;
  Buffer<int32_t> lane;  // [runs, LANES]; only where `fine`
  template <typename F>
  static Cut of(const Weight& w, int64_t group) {
    const int64_t blocks = w.k / BLOCK, chunks = (blocks + F::blocks - 1) / F::blocks;
    const int64_t share = group < 0 ? blocks : group / BLOCK, scaled = blocks / w.groups;
    const int64_t common = std::gcd(share, scaled);
    const int64_t run = common == blocks ? chunks : common % F::blocks ? 1 : common / F::blocks, runs = chunks / run;
    const bool fine = w.groups > 1 && scaled % F::blocks != 0;
    Cut c{blocks, chunks, share, run, runs, fine, std::vector<int32_t>(runs), Buffer<int32_t>(fine ? runs * LANES : 0)};
    for (int64_t r = 0; r < runs; ++r) {
      c.first[r] = r * run * F::blocks / scaled;
      for (int64_t l = 0; fine && l < LANES; ++l)
        *c.lane.at(r * LANES + l) = std::min(r * F::blocks + l * F::blocks / LANES, blocks - 1) / scaled - c.first[r];
    }
    return c;
  }
};

template <typename F>
inline void set_block(vl& lanes, int i, float value) {  // the lanes of block i of a chunk
  constexpr int n = LANES / F::blocks;
  for (int l = 0; l < n; ++l) lanes[i * n + l] = value;
}

// Inputs [M, K] as integers and scales: for each row and run a record, which is read from its first byte to its last:
// LANES int32, minus what zero weights would give; LANES float32, the scales; the integers of each chunk.
template <typename F>
struct Inputs {
  typedef typename F::Input Input;
  const Cut& cut;
  int64_t record;          // bytes
  Buffer<uint8_t> bytes;   // [M, runs, record]
  Buffer<float> total;     // [M, G]: of the inputs under one weight scale; only where there are zero points
  int64_t groups;
  Inputs(const Weight& w, const Cut& c, int64_t m)
      : cut(c), record(2 * CHUNK + c.run * F::inputs * sizeof(Input)), bytes(m * c.runs * record),
        total(w.zero ? m * w.groups : 0), groups(w.zero ? w.groups : 0) {}

  const uint8_t* row(int64_t m) const { return bytes.at(m * cut.runs * record); }
  static const Input* chunk(const uint8_t* record, int64_t c) {
    return reinterpret_cast<const Input*>(record + 2 * CHUNK) + c * F::inputs;
  }

  void round(const float* x, int64_t m) {
    std::vector<float> steps(cut.blocks);  // of each block, so that only this loop divides
    uint8_t* to = bytes.at(m * cut.runs * record);
    for (int64_t b = 0; b < cut.blocks; b += cut.share)
      std::fill_n(&steps[b], cut.share, int8_step(x + b * BLOCK, cut.share * BLOCK));
    uint8_t zeros[CHUNK];
    std::fill(zeros, zeros + CHUNK, F::zero);
    const auto nothing = F::decode(zeros);
    for (int64_t r = 0; r < cut.runs; ++r, to += record) {
      const int64_t first = r * cut.run * F::blocks, last = std::min(first + cut.run * F::blocks, cut.blocks);
      for (int64_t b = first; b < last; ++b) {
        int8_t values[BLOCK];
        const int32_t sum = round_block(x + b * BLOCK, steps[b], values);
        F::place(values, b % F::blocks, const_cast<Input*>(chunk(to, (b - first) / F::blocks)));
        if (groups) *total.at(m * groups + b * groups / cut.blocks) += steps[b] * sum;
      }
      vi given = {};
      vl lanes;
      for (int64_t c = 0; c < cut.run; ++c) given = F::dot(given, nothing, F::values(chunk(to, c)));
      for (int i = 0; i < F::blocks; ++i) set_block<F>(lanes, i, steps[std::min(first + i, cut.blocks - 1)]);
      given = -given;
      std::memcpy(to, &given, sizeof(vi));
      std::memcpy(to + CHUNK, &lanes, sizeof(vl));
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

// N floats in the first lanes. (Written to memory one by one and read as a vector, they would be waited for.)
template <int N>
inline vl first_lanes(const float* p) {
#if defined(__AVX512F__)
  if constexpr (LANES == 16) return (vl)_mm512_maskz_loadu_ps((1 << N) - 1, p);
#endif
  vl v = {};
  for (int l = 0; l < N; ++l) v[l] = p[l];
  return v;
}

// Lane l of the result is lane i[l] of v.
inline vl lookup(vl v, vi i) {
#ifdef __clang__
  vl found;
  for (int l = 0; l < LANES; ++l) found[l] = v[i[l]];
  return found;
#else
  return __builtin_shuffle(v, i);
#endif
}

// Element i of the result is the sum of v[i]: halfway for all four at once, as a sum alone takes longer than a short row
// of weights.
[[gnu::always_inline]] inline void sums_of_four(const vl* v, float* to) {
  const auto join = [](vl a, vl b, auto S) {  // lanes where bit S is clear are sums of two lanes of a, the others of b
    constexpr int s = S;
    const vi x = (vi)a, y = (vi)b;
    return (vl)pick(x, y, [](int l) { return l & s ? LANES + l - s : l; }) +
           (vl)pick(x, y, [](int l) { return l & s ? LANES + l : l + s; });
  };
  constexpr std::integral_constant<int, 1> one;
  constexpr std::integral_constant<int, 2> two;
  const vl four = join(join(v[0], v[1], one), join(v[2], v[3], one), two);
  typedef float v4 __attribute__((vector_size(16)));
  v4 parts[LANES / 4];
  std::memcpy(parts, &four, sizeof(vl));
  for (int i = LANES / 8; i; i /= 2)
    for (int j = 0; j < i; ++j) parts[j] += parts[j + i];
  std::memcpy(to, parts, sizeof(v4));
}

enum class Scales { run, chunk, fine };  // the same for several chunks; for one; several weight scales in a chunk

// Rows of a weight from `first` on and their scales, `row` and `groups` apart.
struct Rows {
  int64_t first, row, groups;
  const uint8_t* data;
  const float* scale;
  Rows from(int64_t n) const { return {n, row, groups, data + (n - first) * row, scale + (n - first) * groups}; }
};

// The last rows of a weight and zeros for rows beyond it, so that a vector may end there; `reach` rows behind those that
// a product reads make it safe in the weight itself.
template <typename F>
struct Tail {
  int64_t reach;
  Buffer<uint8_t> data;
  Buffer<float> scale;
  Rows view;
  Tail(const Weight& w, const Cut& cut, int64_t most)
      : reach(std::max<int64_t>(2, (cut.chunks * CHUNK - 1) / (cut.blocks * F::bytes) + 1)),
        data((reach + 2 * most) * cut.chunks * CHUNK), scale((reach + 2 * most) * w.groups + F::blocks),
        view{std::max<int64_t>(0, w.n - reach - most), cut.chunks * CHUNK, w.groups, data.at(0), scale.at(0)} {
    const int64_t bytes = cut.blocks * F::bytes;
    for (int64_t n = view.first; n < w.n; ++n)
      std::memcpy(data.at((n - view.first) * view.row), w.data + n * bytes, bytes);
    std::copy(w.scale + view.first * w.groups, w.scale + w.n * w.groups, scale.at(0));
  }
};

// M input rows by R weight rows of `rows`: out[m, n] for m < M and n in [rows.first, min(rows.first + R, end)).
template <typename F, int M, int R, Scales S>
void block_product(const Weight& w, const Rows& rows, const Inputs<F>& x, int64_t row, int64_t end, float* out) {
  const Cut& cut = x.cut;
  const int64_t record = x.record, stride = rows.row, chunks = S == Scales::run ? cut.run : 1;
  const int32_t* first = cut.first.data();
  const uint8_t *p = rows.data, *q[M];
  for (int m = 0; m < M; ++m) q[m] = x.row(row + m);
  // The rows of the next call follow these in memory. Fetched in that order, cold weights arrive at the bandwidth of a
  // plain read; interleaved streams left to the processor reached 40 % of that.
  const uint8_t* ahead = p + R * stride + AHEAD;
  vl total[M * R < 4 ? 4 : M * R] = {};
  for (int64_t run = 0; run < cut.runs; ++run) {
    vi acc[M][R];
    for (int m = 0; m < M; ++m) {
      vi begun = {};
      if constexpr (F::offset) begun = load<vi>(q[m]), hold(begun);
      for (int r = 0; r < R; ++r) acc[m][r] = begun;
    }
    for (int64_t c = 0; c < chunks; ++c, p += CHUNK) {
      typename F::Values values[M];
      for (int m = 0; m < M; ++m) values[m] = F::values(x.chunk(q[m], c));
      for (int r = 0; r < R; ++r, ahead += CHUNK) {
        if constexpr (M <= 2) __builtin_prefetch(ahead, 0, 2);
        const auto weights = F::decode(p + r * stride);
        for (int m = 0; m < M; ++m) acc[m][r] = F::dot(acc[m][r], weights, values[m]);
      }
    }
    vl scales[M];
    for (int m = 0; m < M; ++m) {
      scales[m] = load<vl>(q[m] + CHUNK);
      hold(scales[m]);
      q[m] += record;
    }
    for (int r = 0; r < R; ++r) {
      const float* const from = rows.scale + r * rows.groups + first[run];
      vl s;
      if constexpr (S == Scales::fine) {
        s = lookup(first_lanes<F::blocks>(from), load<vi>(cut.lane.at(run * LANES)));
      } else {
        s = *from - vl{};
      }
      for (int m = 0; m < M; ++m)
        total[m * R + r] += __builtin_convertvector(acc[m][r], vl) * scales[m] * s;
    }
  }
  float y[M * R < 4 ? 4 : M * R];
  for (int i = 0; i < M * R; i += 4) sums_of_four(total + i, y + i);
  for (int64_t r = 0, n = rows.first; r < R && n < end; ++r, ++n)
    for (int m = 0; m < M; ++m) {
      if (w.zero)
        y[m * R + r] -= zero_share(w.scale + n * w.groups, w.zero + n * w.groups, x.total.at((row + m) * w.groups), w.groups);
      out[(row + m) * w.n + n] = y[m * R + r] + (w.bias ? w.bias[n] : 0.f);
    }
}

constexpr int MOST_ROWS = 4;  // weight rows of one `block_product`

// M input rows by the weight rows [from, end).
template <typename F, int M, Scales S>
void slab_product(const Weight& w, const Tail<F>& tail, const Inputs<F>& x, int64_t row, int64_t from, int64_t end,
                  float* out) {
  constexpr int R = M == 1 ? MOST_ROWS : 2;
  const Rows whole{0, x.cut.blocks * F::bytes, w.groups, w.data, w.scale};
  for (int64_t n = from; n < end; n += R)
    block_product<F, M, R, S>(w, n + R + tail.reach <= w.n ? whole.from(n) : tail.view.from(n), x, row, end, out);
}

template <typename F, Scales S>
void product(const Weight& w, const Inputs<F>& x, int64_t m, float* out) {
  const int64_t bytes = x.cut.blocks * F::bytes;
  const Tail<F> tail(w, x.cut, MOST_ROWS);
  const int64_t grain = std::max<int64_t>(1, (64 << 10) / bytes), slab = std::max<int64_t>(MOST_ROWS, SLAB / bytes / MOST_ROWS * MOST_ROWS);
  at::parallel_for(0, w.n, grain, [&](int64_t begin, int64_t stop) {
    for (int64_t from = begin; from < stop; from += slab) {
      const int64_t end = std::min(from + slab, stop);
      int64_t i = 0;
      for (; i + 4 <= m; i += 4) slab_product<F, 4, S>(w, tail, x, i, from, end, out);
      for (; i + 2 <= m; i += 2) slab_product<F, 2, S>(w, tail, x, i, from, end, out);
      for (; i < m; ++i) slab_product<F, 1, S>(w, tail, x, i, from, end, out);
    }
  });
}

// All rows by `block_product`, for x contiguous with m rows.
template <typename F>
void by_blocks(const Weight& w, const at::Tensor& x, int64_t group, int64_t m, at::Tensor& out) {
  const Floats xf(x);
  const Cut cut = Cut::of<F>(w, group);
  Inputs<F> inputs(w, cut, m);
  at::parallel_for(0, m, std::max<int64_t>(1, (64 << 10) / w.k), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) inputs.round(xf.data + i * w.k, i);
  });
  const auto run = cut.fine ? product<F, Scales::fine> : cut.run > 1 ? product<F, Scales::run> : product<F, Scales::chunk>;
  if (x.scalar_type() == at::kFloat) {
    run(w, inputs, m, out.mutable_data_ptr<float>());
  } else if (m >= GEMM_ROWS) {
    const at::Tensor wide = at::empty(out.sizes(), x.options().dtype(at::kFloat));
    run(w, inputs, m, wide.mutable_data_ptr<float>());
    out.copy_(wide);
  } else {  // a decode step: two calls of ATen would take longer than the conversion
    std::vector<float> wide(m * w.n);
    run(w, inputs, m, wide.data());
    WITH_REDUCED_TYPE(out, narrow(wide.data(), m * w.n, to));
  }
}

template <typename F>
at::Tensor int8_linear(const at::Tensor& x, const at::Tensor& data, const at::Tensor& scale,
                       const std::optional<at::Tensor>& zero, const std::optional<at::Tensor>& bias, int64_t group) {
  const at::Tensor xc = x.contiguous(), bc = bias ? bias->contiguous() : at::Tensor();  // outlives its Floats
  const Floats bf(bc);
  const Weight w = checked<F>(x, data, &scale, zero ? &*zero : nullptr, bias, bf.data);
  TORCH_CHECK(group == -1 || (group > 0 && group % BLOCK == 0 && w.k % group == 0), "inputs cannot be rounded in ",
              "groups of ", group, ": use -1, or a multiple of ", BLOCK, " that divides ", w.k);
  TORCH_CHECK(w.k <= MOST_FEATURES, w.k, " features could overflow a sum in 32 bits; at most ", MOST_FEATURES);
  auto shape = x.sizes().vec();
  shape.back() = w.n;
  at::Tensor out = at::empty(shape, x.options());
  if (out.numel() == 0) return out;
  const int64_t m = x.numel() / w.k;
#ifdef INT8_GEMM
  if (m >= INT8_GEMM_ROWS) {
    int8_gemm<F>(w, xc, group, m, out);
    return out;
  }
#endif
  by_blocks<F>(w, xc, group, m, out);
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
