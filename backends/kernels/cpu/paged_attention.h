// Attention of one new token over a key-value cache in blocks; `paged_attention.py` says what it computes.
//
// The positions that a row sees are taken 256 at a time. Such a piece has a softmax of its own: the largest score, the
// weights' total and the sums of values. Pieces are merged in their order, so a result does not depend on the number of
// threads, and scratch does not grow with the context unless the pieces of a row are shared out.
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
// total before that scale. A NaN does not count as the largest, but makes the total one.
struct Softmax {
  float largest, total;
};
inline Softmax softmax(float* scores, int64_t n, float scale, const float* k_scale, const float* v_scale) {
  vf top = vf{} + LOWEST, total = {};
  for (int64_t i = 0; i < n; i += W) {
    vf s = load<vf>(scores + i) * scale;
    if (k_scale) s *= load<vf>(k_scale + i);
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

// What a row of the batch sees: `sinks` positions, and those from `first` on, `seen` in all. None where it is lost.
struct Row {
  const int32_t* table;
  int64_t stride, sinks = 0, first = 0, seen = 0;
  bool lost = false;
  int64_t pieces() const { return (seen + PIECE - 1) / PIECE; }
};

template <typename E>
struct PagedAttention {
  Paged<E> k, v;
  Paged<float> k_scale, v_scale;
  const float* q;  // [B, H_kv, G, D]
  int64_t kv_heads, group, d, block_size;
  float scale;  // of scores in base 2
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
    const int64_t n = to.n = std::min(PIECE, row.seen - from);
    for (int64_t i = 0; i < n;) {
      const bool sink = from + i < row.sinks;
      const int64_t position = from + i + (sink ? 0 : row.first - row.sinks), start = position % block_size;
      const int64_t block = row.table[position / block_size * row.stride];
      const int64_t run = std::min((sink ? std::min(n, row.sinks - from) : n) - i, block_size - start);
      for (int64_t slot = start; slot < start + run; ++slot, ++i) {
        to.keys[i] = k.at(block, head, slot), to.values[i] = v.at(block, head, slot);
        if (k_scale.data) to.k_scale[i] = *k_scale.at(block, head, slot);
        if (v_scale.data) to.v_scale[i] = *v_scale.at(block, head, slot);
      }
    }
    for (int64_t i = n; i % W; ++i) to.keys[i] = to.keys[n - 1], to.k_scale[i] = to.v_scale[i] = 0;
  }

  // The part of one piece, that of row b from the position it sees as number `from` on.
  void attend(int64_t b, int64_t head, int64_t from, Scratch& s, float* part) const {
    gather(rows[b], head, from, s);
    const float* const query = q + (b * kv_heads + head) * group * d;
    by_heads(group, [&](auto count, int64_t g) {
      constexpr int G = count;
      const auto product = d % W ? score<E, G, true> : score<E, G, false>;
      product(query + g * d, s.keys, s.n, d, &s.scores[g * PIECE]);
    });
    for (int64_t g = 0; g < group; ++g) {
      const Softmax of = softmax(&s.scores[g * PIECE], s.n, scale * unit<E>, k_scale.data ? s.k_scale : nullptr,
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

  // Add the next part to `all`, both in units of 2^largest.
  void merge(const float* part, float* all) const {
    for (int64_t g = 0; g < group; ++g) {
      const float largest = std::max(all[g], part[g]), shift = largest == LOWEST ? 0 : largest;
      const float keep = std::exp2(all[g] - shift), share = std::exp2(part[g] - shift);
      float* const to = all + 2 * group + g * d;
      const float* const from = part + 2 * group + g * d;
      all[g] = largest, all[group + g] = all[group + g] * keep + part[group + g] * share;
      for (int64_t j = 0; j < d; ++j) to[j] = to[j] * keep + from[j] * share;
    }
  }

  // The result of one KV head: 0 for a row that sees nothing, 0 / 0 for one that is lost.
  void finish(const Row& row, float* all, at::Tensor& out, int64_t index) const {
    for (int64_t g = 0; g < group; ++g) {
      const float total = row.seen || row.lost ? all[group + g] : 1;
      for (int64_t j = 0; j < d; ++j) all[2 * group + g * d + j] = all[2 * group + g * d + j] * unit<E> / total;
    }
    const float* const result = all + 2 * group;
    const int64_t count = group * d, first = index * count;
    if (out.scalar_type() == at::kFloat) {
      std::copy(result, result + count, out.mutable_data_ptr<float>() + first);
    } else {
      WITH_REDUCED_TYPE(out, for (int64_t i = 0; i < count; ++i) to[first + i] = static_cast<T>(result[i]));
    }
  }

  // Every result. Where there are few KV heads for the threads, pieces are shared out first and merged after.
  void run(at::Tensor& out) const {
    const int64_t all_heads = rows.size() * kv_heads, threads = at::get_num_threads();
    std::vector<int64_t> starts(1);  // of each row's pieces
    for (const Row& row : rows) starts.push_back(starts.back() + kv_heads * row.pieces());
    const int64_t pieces = starts.back();
    const bool share = threads > 1 && all_heads < 4 * threads && pieces > all_heads;
    const std::unique_ptr<float[]> parts(share ? new float[pieces * part_size()] : nullptr);
    if (share) {
      at::parallel_for(0, pieces, grain(1), [&](int64_t begin, int64_t end) {
        Scratch scratch(*this);
        for (int64_t i = begin; i < end; ++i) {
          const int64_t b = std::upper_bound(starts.begin(), starts.end(), i) - starts.begin() - 1;
          const int64_t each = rows[b].pieces(), n = i - starts[b];
          attend(b, n / each, n % each * PIECE, scratch, &parts[i * part_size()]);
        }
      });
    }
    at::parallel_for(0, all_heads, share ? all_heads : grain(pieces / all_heads), [&](int64_t begin, int64_t end) {
      Scratch scratch(*this);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / kv_heads, head = i % kv_heads, each = rows[b].pieces();
        std::vector<float> all(part_size());
        std::fill(all.begin(), all.begin() + group, LOWEST);
        for (int64_t n = 0; n < each; ++n) {
          if (!share) attend(b, head, n * PIECE, scratch, scratch.part.get());
          merge(share ? &parts[(starts[b] + head * each + n) * part_size()] : scratch.part.get(), all.data());
        }
        finish(rows[b], all.data(), out, i);
      }
    });
  }
};

// What each row sees: nothing where it is longer than its table or sees a block outside the cache.
inline std::vector<Row> seen_rows(const at::Tensor& table, const at::Tensor& lengths, int64_t blocks,
                                  int64_t block_size, int64_t window, int64_t sinks) {
  std::vector<Row> rows;
  for (int64_t b = 0; b < lengths.size(0); ++b) {
    Row row{table.const_data_ptr<int32_t>() + b * table.stride(0), table.stride(1)};
    const int64_t length = lengths.const_data_ptr<int32_t>()[b * lengths.stride(0)];
    row.first = window && length > window ? length - window : 0;
    row.sinks = std::min(sinks, row.first);
    row.lost = length > table.size(1) * block_size;
    const auto check = [&](int64_t begin, int64_t end) {
      if (begin >= end || row.lost) return;
      for (int64_t i = begin / block_size; i <= (end - 1) / block_size; ++i)
        row.lost |= row.table[i * row.stride] < 0 || row.table[i * row.stride] >= blocks;
    };
    check(0, row.sinks);
    check(row.first, length);
    row.seen = row.lost ? 0 : std::max<int64_t>(0, row.sinks + length - row.first);
    rows.push_back(row);
  }
  return rows;
}

inline void check_paged(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                        const std::optional<at::Tensor>& k_scale, const std::optional<at::Tensor>& v_scale,
                        const at::Tensor& table, const at::Tensor& lengths, int64_t window, int64_t sinks) {
  TORCH_CHECK(q.dim() == 3 && k.dim() == 4 && k.sizes() == v.sizes() && q.size(2) == k.size(3),
              "paged_attention takes q [B, H, D], k_cache and v_cache [blocks, H_kv, block_size, D]; got ", q.sizes(),
              ", ", k.sizes(), ", ", v.sizes());
  TORCH_CHECK(k.size(1) > 0 && q.size(1) % k.size(1) == 0, "paged_attention needs H to be a multiple of H_kv; got ",
              q.size(1), " and ", k.size(1));
  const bool bytes = k.scalar_type() == at::kChar || k.scalar_type() == at::kFloat8_e4m3fn;
  TORCH_CHECK(k.scalar_type() == v.scalar_type() && (bytes || k.scalar_type() == q.scalar_type()),
              "paged_attention takes a cache of the type of q, int8 or float8_e4m3fn; got ", q.scalar_type(), ", ",
              k.scalar_type(), " and ", v.scalar_type());
  for (const auto& [name, scale] : {std::pair("k_scale", &k_scale), std::pair("v_scale", &v_scale)}) {
    TORCH_CHECK(scale->has_value() == bytes, name, " goes with an 8-bit cache and no other; the cache is ",
                k.scalar_type());
    TORCH_CHECK(!*scale || ((*scale)->scalar_type() == at::kFloat && (*scale)->sizes() == k.sizes().slice(0, 3)),
                name, " must be float32 ", k.sizes().slice(0, 3));
  }
  TORCH_CHECK(table.dim() == 2 && table.size(0) == q.size(0) && table.scalar_type() == at::kInt,
              "block_table must be int32 [", q.size(0), ", max_blocks]; got ", table.scalar_type(), " ", table.sizes());
  TORCH_CHECK(lengths.dim() == 1 && lengths.size(0) == q.size(0) && lengths.scalar_type() == at::kInt,
              "lengths must be int32 [", q.size(0), "]; got ", lengths.scalar_type(), " ", lengths.sizes());
  TORCH_CHECK(window >= 0 && sinks >= 0, "window and sinks must be 0 or more; got ", window, " and ", sinks);
}

at::Tensor paged_attention(const at::Tensor& q, const at::Tensor& k_cache, const at::Tensor& v_cache,
                           const std::optional<at::Tensor>& k_scale, const std::optional<at::Tensor>& v_scale,
                           const at::Tensor& block_table, const at::Tensor& lengths, double scale, int64_t window,
                           int64_t sinks) {
  check_paged(q, k_cache, v_cache, k_scale, v_scale, block_table, lengths, window, sinks);
  const auto inner = [](const at::Tensor& t) { return t.stride(3) == 1 ? t : t.contiguous(); };
  const at::Tensor qc = q.contiguous(), k = inner(k_cache), v = inner(v_cache);
  const Floats wide(qc);
  at::Tensor out = at::empty(q.sizes(), q.options());
  if (!q.numel()) return out;
  const auto attend = [&](auto element) {
    typedef decltype(element) E;
    PagedAttention<E>{Paged<E>(k), Paged<E>(v), Paged<float>(k_scale), Paged<float>(v_scale), wide.data, k.size(1),
                      q.size(1) / k.size(1), q.size(2), k.size(2), static_cast<float>(scale / std::log(2.)),
                      seen_rows(block_table, lengths, k.size(0), k.size(2), window, sinks)}
        .run(out);
  };
  switch (k.scalar_type()) {
    case at::kFloat: attend(float()); break;
    case at::kBFloat16: attend(at::BFloat16()); break;
    case at::kHalf: attend(at::Half()); break;
    case at::kChar: attend(int8_t()); break;
    default: attend(at::Float8_e4m3fn());
  }
  return out;
}

TORCH_LIBRARY_IMPL(optimizer, CPU, m) { m.impl("paged_attention", paged_attention); }

}  // namespace
