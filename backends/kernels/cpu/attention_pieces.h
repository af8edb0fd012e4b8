// The pieces of attention of one new token: 256 of the positions that a row sees, wherever they lie in the cache.
//
// A piece has a softmax of its own: the largest score, the weights' total and the sums of values.
// Up to four query heads of a KV head share each vector of the cache that is read and widened.
#pragma once
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <memory>

#include "kv_write.h"

namespace {

constexpr int64_t PIECE = 256;             // positions: their keys and the scores of a few heads stay in L2
constexpr int VALUES = W == 16 ? 4 : 2;    // vectors of a value whose sums stay in registers, for four heads
constexpr int64_t TASK_BYTES = 64 << 10;   // of the cache: below that a second thread costs more than it brings
constexpr float LOWEST = -std::numeric_limits<float>::infinity();

// Element i is the sum of vector i: by halves that are interleaved, since W sums one by one take longer than the
// products of a short head.
inline vf sums(const vf (&v)[W]) {
#if defined(__AVX512F__)
  __m512 pairs[8], fours[4], eights[2];
  for (int i = 0; i < 8; ++i)
    pairs[i] = _mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]) + _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]);
  const auto join = [](__m512 a, __m512 b) {
    const __m512d c = _mm512_castps_pd(a), d = _mm512_castps_pd(b);
    return _mm512_castpd_ps(_mm512_unpacklo_pd(c, d)) + _mm512_castpd_ps(_mm512_unpackhi_pd(c, d));
  };
  const auto lanes = [](__m512 a, __m512 b) {
    return _mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xdd);
  };
  for (int i = 0; i < 4; ++i) fours[i] = join(pairs[2 * i], pairs[2 * i + 1]);
  for (int i = 0; i < 2; ++i) eights[i] = lanes(fours[2 * i], fours[2 * i + 1]);
  return (vf)lanes(eights[0], eights[1]);
#elif defined(__AVX2__)
  const auto fours = [](const vf* a) {
    return _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
  };
  const __m256 low = fours(v), high = fours(v + 4);
  return (vf)(_mm256_permute2f128_ps(low, high, 0x20) + _mm256_permute2f128_ps(low, high, 0x31));
#else
  vf all;
  for (int i = 0; i < W; ++i) all[i] = sum(v[i]);
  return all;
#endif
}

// 2^x for x <= 0 or NaN, to an ulp or two; 0 below 2^-125. The polynomial is that of Cephes' exp2f.
inline vf exp2_below(vf x) {
  constexpr float rounder = 12582912.f;  // 1.5 * 2^23: adding it leaves an integer in the low bits
  const vf shifted = x + rounder, r = x - (shifted - rounder), zero = {};
  vf p = r * 1.535336188319500e-4f + 1.339887440266574e-3f;
  p = (p * r + 9.618437357674640e-3f) * r + 5.550332471162809e-2f;
  p = (p * r + 2.402264791363012e-1f) * r + 6.931472028550421e-1f;
  const vu power = (load<vu>(&shifted) << 23) + 0x3f800000u;
  return x < -125.f ? zero : (p * r + 1.f) * load<vf>(&power);
}

// cap · tanh(x ln 2 / 2), NaN for NaN: with x = 2 s / (c ln 2) and cap = c / ln 2, scores s capped at c, in base 2.
inline vf capped(vf x, float cap) {
  const vf power = exp2_below(x < 0 ? x : -x), size = (1.f - power) / (1.f + power) * cap;
  return x < 0 ? -size : size;
}

// Products of G query heads `q [G, D]` with the keys of n positions, W / G at a time: `scores[g * PIECE + position]`.
// TAIL: D is no multiple of W. A constant, as GCC would spill the sums between a loop and a part that may follow it.
template <typename E, int G, bool TAIL>
void score(const float* q, const E* const* keys, int64_t n, int64_t d, float* scores) {
  constexpr int P = W / G;
  const int64_t whole = d / W * W;
  for (int64_t i = 0; i < n; i += P) {
    vf acc[W];
    for (vf& a : acc) a = vf{};
    const auto step = [&](int64_t j, const auto& read) {
      for (int p = 0; p < P; ++p) {
        const vf key = read(keys[i + p] + j);
        for (int g = 0; g < G; ++g) acc[g * P + p] += read(q + g * d + j) * key;
      }
    };
    for (int64_t j = 0; j < whole; j += W) step(j, [](const auto* p) { return elements(p); });
    if constexpr (TAIL) step(whole, [d, whole](const auto* p) { return last_elements(p, d - whole); });
    const vf all = sums(acc);
    float out[W];
    std::memcpy(out, &all, sizeof(vf));
    for (int g = 0; g < G; ++g) std::memcpy(scores + g * PIECE + i, out + g * P, P * sizeof(float));
  }
}

// Scores of n positions, in place, to weights times the values' scale; returns the largest score, in base 2, and their
// total before that scale. A NaN does not count as the largest, but makes the total one. `cap` is that of `capped`, or 0.
struct Softmax {
  float largest, total;
};
inline Softmax softmax(float* scores, int64_t n, float scale, float cap, const float* k_scale, const float* v_scale) {
  vf top = vf{} + LOWEST, total = {};
  for (int64_t i = 0; i < n; i += W) {
    vf s = load<vf>(scores + i) * scale;
    if (k_scale) s *= load<vf>(k_scale + i);
    if (cap) s = capped(s, cap);
    for (int64_t l = n - i; l < W; ++l) s[l] = LOWEST;
    top = s > top ? s : top;
    std::memcpy(scores + i, &s, sizeof(vf));
  }
  float largest = LOWEST;
  for (int i = 0; i < W; ++i) largest = std::max(largest, top[i]);
  const float shift = largest == LOWEST ? 0 : largest;  // -inf - (-inf) is NaN
  for (int64_t i = 0; i < n; i += W) {
    vf weight = exp2_below(load<vf>(scores + i) - shift);
    total += weight;
    if (v_scale) weight *= load<vf>(v_scale + i);
    std::memcpy(scores + i, &weight, sizeof(vf));
  }
  return {largest, sum(total)};
}

// C vectors, from column j on, of the sums of n values times the weights of G heads. TAIL: the last of D, under W.
template <typename E, int G, int C, bool TAIL = false>
void weigh(const float* weights, const E* const* values, int64_t n, int64_t d, int64_t j, float* out) {
  vf acc[G][C] = {};
  for (int64_t i = 0; i < n; ++i) {
    for (int c = 0; c < C; ++c) {
      const E* const p = values[i] + j + c * W;
      const vf value = TAIL ? last_elements(p, d - j) : elements(p);
      for (int g = 0; g < G; ++g) acc[g][c] += weights[g * PIECE + i] * value;
    }
  }
  for (int g = 0; g < G; ++g) std::memcpy(out + g * d + j, acc[g], TAIL ? (d - j) * sizeof(float) : sizeof(acc[g]));
}

// Run `body(G, first)` over `count` heads, four at a time while there are.
template <typename F>
inline void by_heads(int64_t count, const F& body) {
  int64_t g = 0;
  for (; g + 4 <= count; g += 4) body(std::integral_constant<int, 4>{}, g);
  if (g + 2 <= count) body(std::integral_constant<int, 2>{}, g), g += 2;
  if (g < count) body(std::integral_constant<int, 1>{}, g);
}

// A tensor `[blocks, H_kv, block_size, ...]`, or nothing.
template <typename E>
struct Paged {
  const E* data = nullptr;
  int64_t block = 0, head = 0, slot = 0;  // strides
  explicit Paged(const at::Tensor& t)
      : data(static_cast<const E*>(t.const_data_ptr())), block(t.stride(0)), head(t.stride(1)), slot(t.stride(2)) {}
  explicit Paged(const std::optional<at::Tensor>& t) {
    if (t) *this = Paged(*t);
  }
  const E* at(int64_t b, int64_t h, int64_t s) const { return data + b * block + h * head + s * slot; }
};

// What a row of the batch sees: `sinks` positions from `begin` on, those from `first` on, and last `root + i` for each
// bit i of `tree`, `seen` in all. None where it is lost. Of a ring the table is one block, whatever the position: a
// stride of 0.
struct Row {
  const int32_t* table;
  int64_t stride, begin = 0, sinks = 0, first = 0, seen = 0, root = 0;
  uint32_t tree = 0;
  bool lost = false;
  int64_t pieces() const { return (seen + PIECE - 1) / PIECE; }
};

template <typename E>
struct PagedAttention {
  Paged<E> k, v;
  Paged<float> k_scale, v_scale;
  const float* q;  // [B, H_kv, G, D]
  int64_t kv_heads, group, d, block_size;
  float scale, cap;  // of scores in base 2, before and after `capped`; no cap is 0
  std::vector<Row> rows;

  // One thread's: where the n positions of a piece lie, their scores [G, PIECE], and what comes of them.
  struct Scratch {
    int64_t n = 0;
    const E *keys[PIECE], *values[PIECE];  // up to a whole vector the last key is repeated
    float k_scale[PIECE], v_scale[PIECE];
    const std::unique_ptr<float[]> scores, part;
    explicit Scratch(const PagedAttention& a) : scores(new float[a.group * PIECE]), part(new float[a.part_size()]) {}
  };

  // Of a piece, or of all up to one: G largest scores, G totals and the sums [G, D].
  int64_t part_size() const { return group * (2 + d); }

  // Of KV heads that have so many pieces, as many as are worth a thread.
  int64_t grain(int64_t pieces) const { return 1 + TASK_BYTES / (1 + pieces * PIECE * d * 2 * sizeof(E)); }

  void gather(const Row& row, int64_t head, int64_t from, Scratch& to) const {
    const int64_t n = to.n = std::min(PIECE, row.seen - from), straight = row.seen - __builtin_popcount(row.tree);
    uint32_t nodes = row.tree;
    for (int64_t taken = straight; taken < from; ++taken) nodes &= nodes - 1;
    for (int64_t i = 0; i < n;) {
      const bool sink = from + i < row.sinks, node = from + i >= straight;
      const int64_t position = node ? row.root + __builtin_ctz(nodes)
                                    : from + i + (sink ? row.begin : row.first - row.sinks);
      if (node) nodes &= nodes - 1;
      const int64_t start = position % block_size, block = row.table[position / block_size * row.stride];
      const int64_t end = node ? i + 1 : std::min(n, (sink ? row.sinks : straight) - from);
      const int64_t run = std::min(end - i, block_size - start);
      for (int64_t slot = start; slot < start + run; ++slot, ++i) {
        to.keys[i] = k.at(block, head, slot), to.values[i] = v.at(block, head, slot);
        if (k_scale.data) to.k_scale[i] = *k_scale.at(block, head, slot);
        if (v_scale.data) to.v_scale[i] = *v_scale.at(block, head, slot);
      }
    }
    for (int64_t i = n; i % W; ++i) to.keys[i] = to.keys[n - 1], to.k_scale[i] = to.v_scale[i] = 0;
  }

  // The part of one piece, that of row b from the position it sees as number `from` on. Sums are in units of `unit<E>`.
  void attend(int64_t b, int64_t head, int64_t from, Scratch& s, float* part) const {
    gather(rows[b], head, from, s);
    const float* const query = q + (b * kv_heads + head) * group * d;
    by_heads(group, [&](auto count, int64_t g) {
      constexpr int G = count;
      const auto product = d % W ? score<E, G, true> : score<E, G, false>;
      product(query + g * d, s.keys, s.n, d, &s.scores[g * PIECE]);
    });
    for (int64_t g = 0; g < group; ++g) {
      const Softmax of = softmax(&s.scores[g * PIECE], s.n, scale * unit<E>, cap, k_scale.data ? s.k_scale : nullptr,
                                 v_scale.data ? s.v_scale : nullptr);
      part[g] = of.largest, part[group + g] = of.total;
    }
    by_heads(group, [&](auto count, int64_t g) {
      constexpr int G = count;
      const float* const weights = &s.scores[g * PIECE];
      float* const to = part + 2 * group + g * d;
      int64_t j = 0;
      for (; j + VALUES * W <= d; j += VALUES * W) weigh<E, G, VALUES>(weights, s.values, s.n, d, j, to);
      for (; j + W <= d; j += W) weigh<E, G, 1>(weights, s.values, s.n, d, j, to);
      if (j < d) weigh<E, G, 1, true>(weights, s.values, s.n, d, j, to);
    });
  }

};

}  // namespace
