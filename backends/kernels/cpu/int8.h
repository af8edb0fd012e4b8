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

  void round(const float* x, int64_t m) {
    std::vector<float> steps(cut.blocks);  // of each block, so that only this loop divides
    typename F::Input* const row = q.at(m * cut.chunks * F::inputs);
    for (int64_t b = 0; b < cut.blocks; b += cut.share)
      std::fill_n(&steps[b], cut.share, int8_step(x + b * BLOCK, cut.share * BLOCK));
    for (int64_t b = 0; b < cut.blocks; ++b) {
      int8_t values[BLOCK];
      const int32_t sum = round_block(x + b * BLOCK, steps[b], values);
      F::place(values, b % F::blocks, row + b / F::blocks * F::inputs);
      if (groups) *total.at(m * groups + b * groups / cut.blocks) += steps[b] * sum;
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

// All rows by `block_product`, for x contiguous with m rows.
template <typename F>
void by_blocks(const Weight& w, const at::Tensor& x, int64_t group, int64_t m, at::Tensor& out) {
  const Floats xf(x);
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
    const at::Tensor wide = at::empty(out.sizes(), x.options().dtype(at::kFloat));
    run(w, inputs, m, wide.mutable_data_ptr<float>());
    out.copy_(wide);
  } else {  // a decode step: two calls of ATen would take longer than the conversion
    std::vector<float> wide(m * w.n);
    run(w, inputs, m, wide.data());
    WITH_REDUCED_TYPE(out, for (int64_t i = 0; i < m * w.n; ++i) to[i] = static_cast<T>(wide[i]));
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
