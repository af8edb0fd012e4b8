// The product of many rows with int8 inputs: a blocked GEMM with output columns in the lanes.
//
// `block_product` (int8.h) decodes a weight for every four rows and ends every output with a sum over lanes. Here the
// weights of COLUMNS columns, a panel, are unpacked once for all rows, as unsigned bytes in the order of their use,
// [K / 4, COLUMNS, 4]; inputs are signed, [K / 4, rows of a tile, 4]. Four bytes of an input row meet a vector of
// weights in every lane: two vectors and R broadcasts serve 2 R instructions of 4 LANES products.
//
// A run is a stretch of K under one pair of scales. Its sum is an exact int32 that starts at minus what the weights'
// offset (8, 128) adds, and is scaled and added in float32 at its end. A row's result depends on no other.
//
// A Zen 4 core starts one vpdpbusd a cycle, 460 billion operations a second. `tile_product` reaches 455 with a scale a
// token, and 405 with scales of 32 values, where eight of them end in a ninth instruction of the same units. Two cores,
// 128 rows by 6912 x 1024 int8 weights, everything included: 800 and 700; `block_product` 360 and 200.
#pragma once
#include <numeric>

#include "int8_operands.h"

#if defined(INT8_EMULATED_LANES) || defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#define INT8_GEMM

namespace {

// From here unpacking pays. With 1024 to 6912 x 1024 weights, 8 rows take 0.5 to 0.7 of the time of `block_product`
// (int8 weights and a scale a token: as long), 16 rows 0.4 to 0.7. Six rows gain most of that already, but up to here a
// step for a few sequences or drafts gives each row the result that it has alone, to the last bit.
constexpr int64_t INT8_GEMM_ROWS = 8;
constexpr int64_t LONGEST_RUN = 1 << 15;  // values: products of at most 255 * 128 and their start stay below 2^31
constexpr int COLUMNS = 2 * LANES, UNIT = 4;

// Rows of a tile. Where an output adds several runs under one weight scale, their sum takes as many registers again.
// More are not faster: these reach what the instructions allow, and 12 or 6 leave 4 rows of 132 empty for 128.
template <bool SEVERAL>
constexpr int ROWS = LANES / (SEVERAL ? 4 : 2);

// How K is cut: `share` values have one input scale, `per_group` runs of `length` values one weight scale.
struct Runs {
  int64_t k, share, length, count, per_group;
  Runs(const Weight& w, int64_t group) : k(w.k), share(group < 0 ? w.k : group) {
    const int64_t common = std::gcd(share, k / w.groups);
    int64_t parts = (common + LONGEST_RUN - 1) / LONGEST_RUN;
    while (common / BLOCK % parts) ++parts;
    length = common / parts, count = k / length, per_group = count / w.groups;
  }
};

// Inputs as integers and scales, in tiles of R rows; what is beyond the last row is zeros.
template <int R>
struct Tiles {
  const Runs& runs;
  int64_t rows, count, groups;
  Buffer<int32_t> q;      // [count, K / 4, R], units of 4
  Buffer<int32_t> start;  // [count, runs, R]
  Buffer<float> scale;    // [count, runs, R]
  Buffer<float> total;    // [count, G, R]: of the inputs under one weight scale; only where there are zero points
  Tiles(const Weight& w, const Runs& r, int64_t m)
      : runs(r), rows(m), count((m + R - 1) / R), groups(w.zero ? w.groups : 0), q(count * R * r.k / UNIT),
        start(count * R * r.count), scale(count * R * r.count), total(count * R * groups) {}

  // Tiles [begin, end) of x [rows, K], for weights whose zero is unpacked to `offset`.
  void round(const Activations& x, int64_t begin, int64_t end, int32_t offset) {
    Buffer<float> wide(runs.k), steps(runs.k / runs.share);
    Buffer<int8_t> bytes(R * runs.k);
    const int64_t units = runs.k / UNIT;
    for (int64_t t = begin; t < end; ++t) {
      const int64_t held = std::min<int64_t>(R, rows - t * R);
      for (int64_t r = 0; r < held; ++r) {
        x.read((t * R + r) * runs.k, runs.k, wide.at(0));
        // All scales first: in one loop the values of a block wait for their largest, which takes 1.3 times as long.
        for (int64_t i = 0; i < runs.k / runs.share; ++i) *steps.at(i) = int8_step(wide.at(i * runs.share), runs.share);
        for (int64_t run = 0; run < runs.count; ++run) {
          const int64_t first = run * runs.length, to = (t * runs.count + run) * R + r;
          const float step = *steps.at(first / runs.share);
          int32_t sum = 0;
          for (int64_t j = first; j < first + runs.length; j += BLOCK)
            sum += round_block(wide.at(j), step, bytes.at(r * runs.k + j));
          *start.at(to) = -offset * sum;
          *scale.at(to) = step;
          if (groups) *total.at((t * groups + run / runs.per_group) * R + r) += step * sum;
        }
      }
      interleave<R>(bytes.at(0), held, units, q.at(t * units * R));
    }
  }
};

// How four stored bytes of a row become units of weights; `at(u)` is where the u-th goes, `offset` what zero becomes.
template <typename F>
struct Unpacked;
template <>
struct Unpacked<Bytes> {
  static constexpr int32_t offset = 128;
  template <typename A>
  static inline void put(vc v, int64_t i, const A& at) {
    v ^= 0x80;
    std::memcpy(at(i), &v, CHUNK);
  }
};
template <>
struct Unpacked<Nibbles> {
  static constexpr int32_t offset = 8;
  template <typename A>
  static inline void put(vc v, int64_t i, const A& at) {
    const vc low = v & 15, high = v >> 4;
    const int64_t u = i / 4 * 8 + i % 4;  // a block is 16 bytes: four units in low halves, then four in high ones
    std::memcpy(at(u), &low, CHUNK);
    std::memcpy(at(u + 4), &high, CHUNK);
  }
};

// The weights of COLUMNS columns from `first`; those beyond the last are copies of it.
struct Panel {
  Buffer<uint8_t> weights;  // [K / 4, COLUMNS, 4]
  Buffer<float> scale;      // [G, COLUMNS]
  Buffer<float> zero;       // [G, COLUMNS]: scale * zero
  Buffer<float> bias;       // [COLUMNS]
  explicit Panel(const Weight& w)
      : weights(w.k * COLUMNS), scale(w.groups * COLUMNS), zero(w.zero ? w.groups * COLUMNS : 0), bias(COLUMNS) {}

  template <typename F>
  static void fill(Panel& panel, const Weight& w, int64_t first) {
    const int64_t bytes = w.k / BLOCK * F::bytes;
    for (int half = 0; half < 2; ++half)
      for (int64_t j = 0; j < bytes; j += CHUNK) {
        const int64_t held = std::min<int64_t>(CHUNK, bytes - j);
        vi v[LANES];
        for (int l = 0; l < LANES; ++l) {
          const uint8_t* const p = w.data + std::min(first + half * LANES + l, w.n - 1) * bytes + j;
          if (held == CHUNK) {
            v[l] = load<vi>(p);
          } else {
            v[l] = vi{};
            std::memcpy(&v[l], p, held);
          }
        }
        transpose(v);
        for (int64_t i = 0; i < held / UNIT; ++i)
          Unpacked<F>::put((vc)v[i], j / UNIT + i, [&](int64_t u) { return panel.weights.at((u * 2 + half) * CHUNK); });
      }
    for (int c = 0; c < COLUMNS; ++c) {
      const int64_t n = std::min(first + c, w.n - 1);
      for (int64_t g = 0; g < w.groups; ++g) {
        *panel.scale.at(g * COLUMNS + c) = w.scale[n * w.groups + g];
        if (w.zero) *panel.zero.at(g * COLUMNS + c) = w.scale[n * w.groups + g] * w.zero[n * w.groups + g];
      }
      *panel.bias.at(c) = w.bias ? w.bias[n] : 0.f;
    }
  }
};

// total[r][c]: row r of tile t by half c of the panel, but for zero points and bias. Not inlined: GCC 12 would keep the
// totals in registers too and load the weights anew for every row, at 1.3 times the time.
template <int R, bool SEVERAL>
[[gnu::noinline]] void tile_product(const Panel& panel, int64_t groups, const Tiles<R>& x, int64_t t, Ahead ahead,
                                    vl (*total)[2]) {
  const Runs& runs = x.runs;
  const uint8_t* w = panel.weights.at(0);
  const int32_t *q = x.q.at(t * runs.k / UNIT * R), *start = x.start.at(t * runs.count * R);
  const float *scale = x.scale.at(t * runs.count * R), *w_scale = panel.scale.at(0);
  for (int r = 0; r < R; ++r) total[r][0] = total[r][1] = vl{};
  for (int64_t g = 0; g < groups; ++g, w_scale += COLUMNS) {
    vl part[R][2];
    if constexpr (SEVERAL)
      for (int r = 0; r < R; ++r) part[r][0] = part[r][1] = vl{};
    for (int64_t run = 0; run < (SEVERAL ? runs.per_group : 1); ++run, start += R, scale += R) {
      vi acc[R][2];
      for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = vi{} + start[r];
      for (const uint8_t* const end = w + runs.length * COLUMNS; w != end; w += 2 * CHUNK, q += R) {
        ahead.fetch();
        const vc w0 = load<vc>(w), w1 = load<vc>(w + CHUNK);
        for (int r = 0; r < R; ++r) {
          const vc unit = (vc)(vi{} + q[r]);
          acc[r][0] = multiply(acc[r][0], w0, unit);
          acc[r][1] = multiply(acc[r][1], w1, unit);
        }
      }
      for (int r = 0; r < R; ++r)
        for (int c = 0; c < 2; ++c) {
          const vl scaled = __builtin_convertvector(acc[r][c], vl) * scale[r];
          part[r][c] = SEVERAL ? part[r][c] + scaled : scaled;
        }
    }
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < 2; ++c) total[r][c] += part[r][c] * load<vl>(w_scale + c * LANES);
  }
}

// What zero points take off: a row of tile t by half c of the panel.
template <int R>
inline vl tile_zero_share(const Panel& panel, const Tiles<R>& x, int64_t t, int64_t r, int c) {
  vl rest = {};
  for (int64_t g = 0; g < x.groups; ++g)
    rest += load<vl>(panel.zero.at(g * COLUMNS + c * LANES)) * *x.total.at((t * x.groups + g) * R + r);
  return rest;
}

// `fill` and `offset` are those of the weight's type, whose rows have `bytes`.
template <bool SEVERAL>
void int8_gemm(const Weight& w, const Runs& runs, void (*fill)(Panel&, const Weight&, int64_t), int32_t offset,
               int64_t bytes, const Activations& x, int64_t m, const Activations& out) {
  constexpr int R = ROWS<SEVERAL>;
  Tiles<R> tiles(w, runs, m);
  at::parallel_for(0, tiles.count, std::max<int64_t>(1, (16 << 10) / (R * w.k)), [&](int64_t begin, int64_t end) {
    tiles.round(x, begin, end, offset);
  });
  at::parallel_for(0, (w.n + COLUMNS - 1) / COLUMNS, panel_grain(m * w.k * COLUMNS), [&](int64_t begin, int64_t end) {
    Panel panel(w);
    for (int64_t first = begin * COLUMNS; first < std::min(end * COLUMNS, w.n); first += COLUMNS) {
      fill(panel, w, first);
      for (int64_t t = 0; t < tiles.count; ++t) {
        vl total[R][2];
        const Ahead ahead(w, bytes, first, COLUMNS, t, tiles.count, w.k / UNIT);
        tile_product<R, SEVERAL>(panel, w.groups, tiles, t, ahead, total);
        for (int64_t r = 0; r < R && t * R + r < m; ++r)
          for (int c = 0; c < 2 && first + c * LANES < w.n; ++c) {
            const int64_t n = first + c * LANES;
            if (w.zero) total[r][c] -= tile_zero_share(panel, tiles, t, r, c);
            out.write((t * R + r) * w.n + n, total[r][c] + load<vl>(panel.bias.at(c * LANES)), w.n - n);
          }
      }
    }
  });
}

// x [m, K] by weights of type F to out [m, N]; both are contiguous.
template <typename F>
void int8_gemm(const Weight& w, const at::Tensor& x, int64_t group, int64_t m, const at::Tensor& out) {
  const Runs runs(w, group);
  const auto run = runs.per_group > 1 ? int8_gemm<true> : int8_gemm<false>;
  run(w, runs, Panel::fill<F>, Unpacked<F>::offset, w.k / BLOCK * F::bytes, Activations(x), m, Activations(out));
}

}  // namespace
#endif
