// The product of many bfloat16 rows and stored weights: a blocked GEMM with output columns in the lanes.
//
// The weights of PAIR_COLUMNS columns, a panel, are decoded once for all rows, to pairs of bfloat16
// [K / 2, PAIR_COLUMNS]; inputs are pairs as well, [K / 2, rows of a tile]. A pair of an input row meets a vector of
// weights in every lane. What is decoded is q - zero: bfloat16 holds that exactly where zero points are integers, so
// stored weights are not rounded. Scales meet the float32 sums of their group. A row's result depends on no other.
//
// Two Zen 4 cores (468 GFLOP/s), 128 rows by 1024 and 6912 x 1024 int8 weights: 399 and 417 GFLOP/s. oneDNN makes 422
// and 405 on plain bfloat16 weights, but 325 and 351 on weights decoded for it in parts, which it packs once more; with
// 16 rows 138 and 148, against 258 and 272.
#pragma once
#include "tiles.h"

// Not with AMX, whose GEMM is oneDNN's. Emulated: tests on processors without the instruction.
#if defined(BFLOAT16_EMULATED) || (defined(__AVX512BF16__) && !defined(__AMX_BF16__))
#define BFLOAT16_GEMM

namespace {

constexpr int PAIR_ROWS = 8, PAIR_COLUMNS = 2 * W;
constexpr int64_t BFLOAT16_GEMM_ROWS = 8;  // a tile: with 1024 to 6912 x 1024 weights 0.5 to 0.9 of the time of `gemv`

// acc[l] + a[2 l] b[2 l] + a[2 l + 1] b[2 l + 1], products and sums in float32.
inline vf multiply_pairs(vf acc, vw a, vw b) {
#if defined(__AVX512BF16__) && !defined(BFLOAT16_EMULATED)
  return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#else
  const vw high = vw{} + static_cast<int32_t>(0xffff0000);
  return acc + (vf)(a & high) * (vf)(b & high) + (vf)(a << 16) * (vf)(b << 16);
#endif
}

// 32 values as pairs of bfloat16, ties to even. (Of subnormal values the instruction makes zeros, as the product does.)
inline void to_pairs(const vf* v, vw* pairs) {
#if defined(__AVX512BF16__) && !defined(BFLOAT16_EMULATED)
  *pairs = (vw)_mm512_cvtne2ps_pbh((__m512)v[1], (__m512)v[0]);
#else
  for (int i = 0; i < V; ++i) store(reinterpret_cast<at::BFloat16*>(pairs) + i * W, v[i], W);
#endif
}

// The weights of PAIR_COLUMNS columns from `first`; those beyond the last are copies of it.
struct PairPanel {
  Buffer<int32_t> weights;  // [K / 2, PAIR_COLUMNS]
  Buffer<float> scale;      // [G, PAIR_COLUMNS]
  Buffer<float> bias;       // [PAIR_COLUMNS]
  explicit PairPanel(const Weight& w)
      : weights(w.k / 2 * PAIR_COLUMNS), scale(w.groups * PAIR_COLUMNS), bias(PAIR_COLUMNS) {}

  template <typename D>
  static void fill(PairPanel& panel, const Weight& w, int64_t first) {
    for (int half = 0; half < 2; ++half) fill_half<D>(w, first + half * W, panel.weights.at(half * W));
    for (int c = 0; c < PAIR_COLUMNS; ++c) {
      const int64_t n = std::min(first + c, w.n - 1);
      for (int64_t g = 0; g < w.groups; ++g)
        *panel.scale.at(g * PAIR_COLUMNS + c) = w.scale_at(n * w.groups + g) * D::unit;
      *panel.bias.at(c) = w.bias ? w.bias[n] : 0.f;
    }
  }

  template <typename D>
  static void fill_half(const Weight& w, int64_t first, int32_t* to) {
    constexpr int P = BLOCK / 2 / W;  // vectors of pairs in a block
    const int64_t blocks = w.k / BLOCK;
    const uint8_t* p[W];
    int64_t row[W];
    for (int l = 0; l < W; ++l) {
      row[l] = std::min(first + l, w.n - 1);
      p[l] = w.data + row[l] * blocks * D::bytes;
    }
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t g = b * w.groups / blocks;
      vw v[P][W];
      for (int l = 0; l < W; ++l) {
        vf q[V];
        vw pairs[P];
        D::block(p[l] + b * D::bytes, q);
        if (D::offset != 0 || w.zero) {
          const float z = D::offset + (w.zero ? w.zero[row[l] * w.groups + g] : 0.f);
          for (int i = 0; i < V; ++i) q[i] -= z;
        }
        to_pairs(q, pairs);
        for (int i = 0; i < P; ++i) v[i][l] = pairs[i];
      }
      for (int i = 0; i < P; ++i) {
        transpose(v[i]);
        for (int u = 0; u < W; ++u, to += PAIR_COLUMNS) std::memcpy(to, &v[i][u], sizeof(vw));
      }
    }
  }
};

// total[r][c]: row r of a tile by half c of the panel, but for the bias. `pairs` of K have one weight scale. It is not
// inlined for the reason that `tile_product` (int8_gemm.h) is not.
[[gnu::noinline]] inline void pair_product(const PairPanel& panel, const int32_t* x, int64_t groups, int64_t pairs,
                                           Ahead ahead, vf (*total)[2]) {
  constexpr int R = PAIR_ROWS;
  const int32_t* w = panel.weights.at(0);
  const float* scale = panel.scale.at(0);
  for (int r = 0; r < R; ++r) total[r][0] = total[r][1] = vf{};
  for (int64_t g = 0; g < groups; ++g, scale += PAIR_COLUMNS) {
    vf part[R][2];
    for (int r = 0; r < R; ++r) part[r][0] = part[r][1] = vf{};
    for (const int32_t* const end = w + pairs * PAIR_COLUMNS; w != end; w += PAIR_COLUMNS, x += R) {
      ahead.fetch();
      const vw w0 = load<vw>(w), w1 = load<vw>(w + W);
      for (int r = 0; r < R; ++r) {
        const vw pair = vw{} + x[r];
        part[r][0] = multiply_pairs(part[r][0], w0, pair);
        part[r][1] = multiply_pairs(part[r][1], w1, pair);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < 2; ++c) total[r][c] += part[r][c] * load<vf>(scale + c * W);
  }
}

// x [m, K] to out [m, N]. `fill` is that of the weight's type, whose rows have `bytes`.
inline void bf16_gemm(const Weight& w, void (*fill)(PairPanel&, const Weight&, int64_t), int64_t bytes,
                      const at::BFloat16* x, int64_t m, at::BFloat16* out) {
  constexpr int R = PAIR_ROWS, C = PAIR_COLUMNS;
  const int64_t tiles = (m + R - 1) / R, pairs = w.k / 2;
  Buffer<int32_t> rows(tiles * pairs * R);  // [tiles, K / 2, R]
  at::parallel_for(0, tiles, std::max<int64_t>(1, (64 << 10) / (R * w.k)), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      interleave<R>(x + t * R * w.k, std::min<int64_t>(R, m - t * R), pairs, rows.at(t * pairs * R));
  });
  at::parallel_for(0, (w.n + C - 1) / C, panel_grain(m * w.k * C), [&](int64_t begin, int64_t end) {
    PairPanel panel(w);
    for (int64_t first = begin * C; first < std::min(end * C, w.n); first += C) {
      fill(panel, w, first);
      for (int64_t t = 0; t < tiles; ++t) {
        vf total[R][2];
        const Ahead ahead(w, bytes, first, C, t, tiles, pairs);
        pair_product(panel, rows.at(t * pairs * R), w.groups, pairs / w.groups, ahead, total);
        for (int64_t r = 0; r < R && t * R + r < m; ++r)
          for (int c = 0; c < 2 && first + c * W < w.n; ++c) {
            const int64_t n = first + c * W;
            store(out + (t * R + r) * w.n + n, total[r][c] + load<vf>(panel.bias.at(c * W)), w.n - n);
          }
      }
    }
  });
}

}  // namespace
#endif
