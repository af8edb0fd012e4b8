// Attention of one new token over a key-value cache in blocks; `paged_attention.py` says what it computes.
//
// Pieces of 256 positions are merged in their order, so a result does not depend on the number of threads, and scratch
// does not grow with the context unless the pieces of a row are shared out.
#pragma once
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <memory>

#include "attention_pieces.h"

namespace {

// Attention over what lies in blocks, and then over what lies in a ring, where rows have one: the parts of both.
template <typename E, typename R>
struct Joint {
  PagedAttention<E> blocks;
  std::optional<PagedAttention<R>> recent;

  struct Scratch {
    typename PagedAttention<E>::Scratch blocks;
    std::optional<typename PagedAttention<R>::Scratch> recent;
    explicit Scratch(const Joint& a) : blocks(a.blocks) {
      if (a.recent) recent.emplace(*a.recent);
    }
  };

  int64_t pieces(int64_t b) const { return blocks.rows[b].pieces() + (recent ? recent->rows[b].pieces() : 0); }

  // Piece n of row b, and what its sums must be multiplied by.
  float attend(int64_t b, int64_t head, int64_t n, Scratch& s, float* part) const {
    const int64_t before = blocks.rows[b].pieces();
    if (n < before) return blocks.attend(b, head, n * PIECE, s.blocks, part), unit<E>;
    return recent->attend(b, head, (n - before) * PIECE, *s.recent, part), unit<R>;
  }

  // Add the next part to `all`, both in units of 2^largest.
  void merge(const float* part, float part_unit, float* all) const {
    const int64_t group = blocks.group, d = blocks.d;
    for (int64_t g = 0; g < group; ++g) {
      const float largest = std::max(all[g], part[g]), shift = largest == LOWEST ? 0 : largest;
      const float keep = std::exp2(all[g] - shift), share = std::exp2(part[g] - shift);
      float* const to = all + 2 * group + g * d;
      const float* const from = part + 2 * group + g * d;
      all[g] = largest, all[group + g] = all[group + g] * keep + part[group + g] * share;
      for (int64_t j = 0; j < d; ++j) to[j] = to[j] * keep + from[j] * (share * part_unit);
    }
  }

  // The result of one KV head: 0 for a row that sees nothing, 0 / 0 for one that is lost.
  void finish(int64_t b, float* all, at::Tensor& out, int64_t index) const {
    const int64_t group = blocks.group, d = blocks.d;
    const bool lost = blocks.rows[b].lost || (recent && recent->rows[b].lost);
    for (int64_t g = 0; g < group; ++g) {
      const float total = lost ? 0 : pieces(b) ? all[group + g] : 1;
      for (int64_t j = 0; j < d; ++j) all[2 * group + g * d + j] = (lost ? 0 : all[2 * group + g * d + j]) / total;
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
    const int64_t kv_heads = blocks.kv_heads, size = blocks.part_size(), rows = blocks.rows.size();
    const int64_t all_heads = rows * kv_heads, threads = at::get_num_threads();
    std::vector<int64_t> starts(1);  // of each row's pieces
    for (int64_t b = 0; b < rows; ++b) starts.push_back(starts.back() + kv_heads * pieces(b));
    const int64_t count = starts.back();
    const bool share = threads > 1 && all_heads < 4 * threads && count > all_heads;
    const std::unique_ptr<float[]> parts(share ? new float[count * size] : nullptr);
    const std::unique_ptr<float[]> units(share ? new float[count] : nullptr);
    if (share) {
      at::parallel_for(0, count, blocks.grain(1), [&](int64_t begin, int64_t end) {
        Scratch scratch(*this);
        for (int64_t i = begin; i < end; ++i) {
          const int64_t b = std::upper_bound(starts.begin(), starts.end(), i) - starts.begin() - 1;
          const int64_t each = pieces(b), n = i - starts[b];
          units[i] = attend(b, n / each, n % each, scratch, &parts[i * size]);
        }
      });
    }
    at::parallel_for(0, all_heads, share ? all_heads : blocks.grain(count / all_heads), [&](int64_t begin, int64_t end) {
      Scratch scratch(*this);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / kv_heads, head = i % kv_heads, each = pieces(b);
        std::vector<float> all(size);
        std::fill(all.begin(), all.begin() + blocks.group, LOWEST);
        for (int64_t n = 0; n < each; ++n) {
          const int64_t at = starts[b] + head * each + n;
          float* const part = share ? &parts[at * size] : scratch.blocks.part.get();
          const float part_unit = share ? units[at] : attend(b, head, n, scratch, part);
          merge(part, part_unit, all.data());
        }
        finish(b, all.data(), out, i);
      }
    });
  }
};

// The lengths of rows, and the nodes of a tree that each sees, where there is one.
struct Extents {
  const at::Tensor lengths;
  const std::optional<at::Tensor> roots, trees;

  static int64_t at(const at::Tensor& values, int64_t b) {
    return values.const_data_ptr<int32_t>()[b * values.stride(0)];
  }
  int64_t length(int64_t b) const { return at(lengths, b); }
  int64_t root(int64_t b) const { return roots ? std::max<int64_t>(0, at(*roots, b)) : 0; }
  uint32_t tree(int64_t b) const { return trees ? static_cast<uint32_t>(at(*trees, b)) : 0; }
  // Where the positions end that are seen by their place, and where all end.
  int64_t straight(int64_t b) const { return trees ? std::min(length(b), root(b)) : length(b); }
  int64_t end(int64_t b) const { return tree(b) ? root(b) + 32 - __builtin_clz(tree(b)) : straight(b); }
};

// Those of a tree's nodes at `root` that lie before position `start`.
inline uint32_t nodes_before(int64_t start, int64_t root) {
  return start - root >= 32 ? ~0u : start <= root ? 0u : (1u << (start - root)) - 1;
}

// What each row sees: nothing where it is longer than its table or sees a block outside the cache.
// What lies in rings from `starts` on is left out.
inline std::vector<Row> seen_rows(const at::Tensor& table, const Extents& extents,
                                  const std::optional<at::Tensor>& starts, int64_t blocks, int64_t block_size,
                                  int64_t window, int64_t sinks) {
  std::vector<Row> rows;
  for (int64_t b = 0; b < table.size(0); ++b) {
    Row row{table.const_data_ptr<int32_t>() + b * table.stride(0), table.stride(1)};
    const int64_t length = extents.length(b), straight = extents.straight(b);
    const int64_t start = starts ? std::max<int64_t>(0, Extents::at(*starts, b)) : std::numeric_limits<int64_t>::max();
    const int64_t end = starts ? std::min(start, std::max<int64_t>(straight, 0)) : straight;
    row.root = extents.root(b), row.tree = extents.tree(b) & nodes_before(start, row.root);
    row.first = window && length > window ? length - window : 0;
    row.sinks = std::min({sinks, row.first, std::max<int64_t>(end, 0)});
    row.lost = extents.end(b) > table.size(1) * block_size;
    const auto check = [&](int64_t begin, int64_t end) {
      if (begin >= end || row.lost) return;
      for (int64_t i = begin / block_size; i <= (end - 1) / block_size; ++i)
        row.lost |= row.table[i * row.stride] < 0 || row.table[i * row.stride] >= blocks;
    };
    check(0, row.sinks);
    check(row.first, end);
    for (uint32_t nodes = row.tree; nodes; nodes &= nodes - 1)
      check(row.root + __builtin_ctz(nodes), row.root + __builtin_ctz(nodes) + 1);
    if (row.lost) row.tree = 0;
    row.seen = row.lost ? 0 : row.sinks + std::max<int64_t>(0, end - row.first) + __builtin_popcount(row.tree);
    rows.push_back(row);
  }
  return rows;
}

// What each row sees of its ring of `capacity` slots: nothing where it has none, or sees more than fits.
inline std::vector<Row> recent_rows(const at::Tensor& rings, const at::Tensor& starts, const Extents& extents,
                                    int64_t count, int64_t capacity, int64_t window, int64_t sinks) {
  std::vector<Row> rows;
  for (int64_t b = 0; b < rings.size(0); ++b) {
    Row row{rings.const_data_ptr<int32_t>() + b * rings.stride(0), 0};
    const int64_t length = extents.length(b), end = extents.straight(b);
    const int64_t start = std::max<int64_t>(0, Extents::at(starts, b));
    const int64_t low = window && length > window ? length - window : 0;
    row.begin = start, row.first = std::max(low, start);
    row.root = extents.root(b), row.tree = extents.tree(b) & ~nodes_before(start, row.root);
    row.sinks = std::max<int64_t>(0, std::min({sinks, low, end}) - start);
    row.seen = row.sinks + std::max<int64_t>(0, end - row.first) + __builtin_popcount(row.tree);
    row.lost = row.seen && (*row.table < 0 || *row.table >= count || extents.end(b) - start > capacity);
    if (row.lost) row.seen = 0, row.tree = 0;
    rows.push_back(row);
  }
  return rows;
}

inline void check_paged(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                        const std::optional<at::Tensor>& k_scale, const std::optional<at::Tensor>& v_scale,
                        const at::Tensor& table, const at::Tensor& lengths, double softcap, int64_t window,
                        int64_t sinks) {
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
  TORCH_CHECK(softcap >= 0 && std::isfinite(softcap), "softcap must be finite and 0 or more; got ", softcap);
}

inline void check_tree(const at::Tensor& q, const std::optional<at::Tensor>& roots,
                       const std::optional<at::Tensor>& trees) {
  TORCH_CHECK(roots.has_value() == trees.has_value(), "roots and trees go together; got one of them");
  for (const auto& [name, rows] : {std::pair("roots", &roots), std::pair("trees", &trees)})
    TORCH_CHECK(!*rows || ((*rows)->dim() == 1 && (*rows)->size(0) == q.size(0) && (*rows)->scalar_type() == at::kInt),
                name, " must be int32 [", q.size(0), "]; got ", (*rows)->scalar_type(), " ", (*rows)->sizes());
}

// Whether rings are given, which are then of the right shapes.
inline bool check_rings(const at::Tensor& q, const at::Tensor& k, const std::optional<at::Tensor>& recent_k,
                        const std::optional<at::Tensor>& recent_v, const std::optional<at::Tensor>& rings,
                        const std::optional<at::Tensor>& starts) {
  const int given = recent_k.has_value() + recent_v.has_value() + rings.has_value() + starts.has_value();
  TORCH_CHECK(given == 0 || given == 4, "recent_k, recent_v, rings and starts go together; got ", given, " of them");
  if (!given) return false;
  TORCH_CHECK(recent_k->dim() == 4 && recent_k->sizes() == recent_v->sizes() && recent_k->size(1) == k.size(1) &&
                  recent_k->size(2) > 0 && recent_k->size(3) == k.size(3) &&
                  recent_k->scalar_type() == q.scalar_type() && recent_v->scalar_type() == q.scalar_type(),
              "recent_k and recent_v must be ", q.scalar_type(), " [rings, ", k.size(1), ", C, ", k.size(3), "]; got ",
              recent_k->scalar_type(), " ", recent_k->sizes(), " and ", recent_v->scalar_type(), " ",
              recent_v->sizes());
  for (const auto& [name, rows] : {std::pair("rings", &rings), std::pair("starts", &starts)})
    TORCH_CHECK((*rows)->dim() == 1 && (*rows)->size(0) == q.size(0) && (*rows)->scalar_type() == at::kInt, name,
                " must be int32 [", q.size(0), "]; got ", (*rows)->scalar_type(), " ", (*rows)->sizes());
  return true;
}

at::Tensor paged_attention(const at::Tensor& q, const at::Tensor& k_cache, const at::Tensor& v_cache,
                           const std::optional<at::Tensor>& k_scale, const std::optional<at::Tensor>& v_scale,
                           const at::Tensor& block_table, const at::Tensor& lengths, double scale, double softcap,
                           int64_t window, int64_t sinks, const std::optional<at::Tensor>& recent_k,
                           const std::optional<at::Tensor>& recent_v, const std::optional<at::Tensor>& rings,
                           const std::optional<at::Tensor>& starts, const std::optional<at::Tensor>& roots,
                           const std::optional<at::Tensor>& trees) {
  check_paged(q, k_cache, v_cache, k_scale, v_scale, block_table, lengths, softcap, window, sinks);
  check_tree(q, roots, trees);
  const bool ringed = check_rings(q, k_cache, recent_k, recent_v, rings, starts);
  const auto inner = [](const at::Tensor& t) { return t.stride(3) == 1 ? t : t.contiguous(); };
  const at::Tensor qc = q.contiguous(), k = inner(k_cache), v = inner(v_cache);
  const at::Tensor rk = ringed ? inner(*recent_k) : k, rv = ringed ? inner(*recent_v) : v;
  const Floats wide(qc);
  at::Tensor out = at::empty(q.sizes(), q.options());
  if (!q.numel()) return out;
  const int64_t kv_heads = k.size(1), group = q.size(1) / kv_heads, d = q.size(2);
  const double base2 = 1 / std::log(2.);
  const float factor = static_cast<float>(softcap ? 2 * base2 * scale / softcap : base2 * scale);
  const float cap = static_cast<float>(base2 * softcap);
  const Extents extents{lengths, roots, trees};
  const auto attend = [&](auto element, auto wide_element) {
    typedef decltype(element) E;
    typedef decltype(wide_element) R;
    const std::optional<at::Tensor> none;
    Joint<E, R> joint{{Paged<E>(k), Paged<E>(v), Paged<float>(k_scale), Paged<float>(v_scale), wide.data, kv_heads, group,
                       d, k.size(2), factor, cap,
                       seen_rows(block_table, extents, starts, k.size(0), k.size(2), window, sinks)},
                      std::nullopt};
    if (ringed)
      joint.recent.emplace(PagedAttention<R>{
          Paged<R>(rk), Paged<R>(rv), Paged<float>(none), Paged<float>(none), wide.data, kv_heads, group, d, rk.size(2),
          factor, cap, recent_rows(*rings, *starts, extents, rk.size(0), rk.size(2), window, sinks)});
    joint.run(out);
  };
  const auto by_query = [&](auto element) {
    switch (q.scalar_type()) {
      case at::kFloat: attend(element, float()); break;
      case at::kBFloat16: attend(element, at::BFloat16()); break;
      default: attend(element, at::Half());
    }
  };
  switch (k.scalar_type()) {
    case at::kFloat: attend(float(), float()); break;
    case at::kBFloat16: attend(at::BFloat16(), at::BFloat16()); break;
    case at::kHalf: attend(at::Half(), at::Half()); break;
    case at::kChar: by_query(int8_t()); break;
    default: by_query(at::Float8_e4m3fn());
  }
  return out;
}

TORCH_LIBRARY_IMPL(optimizer, CPU, m) { m.impl("paged_attention", paged_attention); }

}  // namespace
