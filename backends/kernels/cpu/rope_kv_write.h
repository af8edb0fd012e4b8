// `rope_kv_write`: rotation, with the norm of each head before it and the write to the cache after it, token by token.
//
// A head is widened to float32 once, and rounded once: to the type of q, or as `kv_write.h` rounds to the cache.
#pragma once
#include "kv_write.h"
#include "tiles.h"

namespace {

template <typename F>
inline void with_float(at::ScalarType type, const F& run) {
  switch (type) {
    case at::kFloat: return run(float());
    case at::kBFloat16: return run(at::BFloat16());
    case at::kHalf: return run(at::Half());
    default: TORCH_CHECK(false, "rope_kv_write takes float32, bfloat16 or float16; got ", type);
  }
}

// `count` values of a type in float32, and zeros up to a whole vector.
inline void widen_row(at::ScalarType type, const void* from, int64_t count, float* to) {
  with_float(type, [&](auto zero) {
    const auto* const p = static_cast<const decltype(zero)*>(from);
    for (int64_t j = 0; j < count; j += W) {
      const vf v = j + W <= count ? elements(p + j) : last_elements(p + j, count - j);
      std::memcpy(to + j, &v, sizeof(vf));
    }
  });
}

// A row rounded to a type.
inline void round_row(at::ScalarType type, const float* from, int64_t count, void* to) {
  with_float(type, [&](auto zero) {
    auto* const p = static_cast<decltype(zero)*>(to);
    for (int64_t j = 0; j < count; j += W) store(p + j, load<vf>(from + j), count - j);
  });
}

inline int64_t padded(int64_t count) { return (count + W - 1) / W * W; }

// The weights of a norm `x / sqrt(mean x^2 + eps) * (weight + offset)` in float32, or nothing.
struct Norm {
  std::vector<float> weight;
  float eps;
  Norm(const std::optional<at::Tensor>& from, double eps, double offset) : eps(static_cast<float>(eps)) {
    if (!from) return;
    const at::Tensor contiguous = from->contiguous();
    weight.resize(padded(from->numel()));
    widen_row(from->scalar_type(), contiguous.const_data_ptr(), from->numel(), weight.data());
    for (float& w : weight) w += static_cast<float>(offset);
  }
  void apply(float* x, int64_t d) const {  // behind its d values x has zeros, and keeps them
    if (weight.empty()) return;
    vf squares = {};
    for (int64_t j = 0; j < d; j += W) squares += load<vf>(x + j) * load<vf>(x + j);
    const float inverse = 1 / std::sqrt(sum(squares) / d + eps);
    for (int64_t j = 0; j < d; j += W) {
      const vf y = load<vf>(x + j) * inverse * load<vf>(&weight[j]);
      std::memcpy(x + j, &y, sizeof(vf));
    }
  }
};

// The first R values of a head turned by the angles of its token; R is even.
inline void rotate(float* x, const float* cos, const float* sin, int64_t r) {
  const int64_t half = r / 2;
  float *const first = x, *const second = x + half;
  int64_t j = 0;
  for (; j + W <= half; j += W) {
    const vf a = load<vf>(first + j), b = load<vf>(second + j);
    const vf turned = a * load<vf>(cos + j) - b * load<vf>(sin + j);
    const vf other = b * load<vf>(cos + half + j) + a * load<vf>(sin + half + j);
    std::memcpy(first + j, &turned, sizeof(vf));
    std::memcpy(second + j, &other, sizeof(vf));
  }
  for (; j < half; ++j) {
    const float a = first[j], b = second[j];
    first[j] = a * cos[j] - b * sin[j];
    second[j] = b * cos[half + j] + a * sin[half + j];
  }
}

// One head in float32 to its place in a cache.
typedef void HeadWriter(const float* x, int64_t d, void* to, float* scale, at::ScalarType type);

template <typename C>
void write_head_bytes(const float* x, int64_t d, void* to, float* scale, at::ScalarType) {
  write_bytes<float, C>(x, d, to, scale);
}
inline void write_head_float(const float* x, int64_t d, void* to, float*, at::ScalarType type) {
  round_row(type, x, d, to);
}
inline HeadWriter* head_writer(at::ScalarType cache) {
  return cache == at::kChar             ? write_head_bytes<int8_t>
         : cache == at::kFloat8_e4m3fn ? write_head_bytes<at::Float8_e4m3fn>
                                        : write_head_float;
}

// Where the heads of one token lie in `x [B, H, S, D]` (or a cache, its block for b and its slot for s).
struct TokenHeads {
  char* first;
  int64_t stride;
  TokenHeads(const at::Tensor& x, int64_t b, int64_t s)
      : first(static_cast<char*>(const_cast<void*>(x.const_data_ptr())) +
              (b * x.stride(0) + s * x.stride(2)) * x.element_size()),
        stride(x.stride(1) * x.element_size()) {}
  void* at(int64_t h) const { return first + h * stride; }
};

inline void check_rope(const at::Tensor& q, const at::Tensor& k, const at::Tensor& cos, const at::Tensor& sin) {
  TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && q.size(0) == k.size(0) && q.sizes().slice(2) == k.sizes().slice(2),
              "rope takes q [B, H, S, D] and k [B, H_kv, S, D]; got ", q.sizes(), " and ", k.sizes());
  TORCH_CHECK(q.scalar_type() == k.scalar_type(), "rope needs q and k of one float type; got ", q.scalar_type(),
              " and ", k.scalar_type());
  TORCH_CHECK(cos.dim() == 3 && cos.sizes() == sin.sizes() && (cos.size(0) == 1 || cos.size(0) == q.size(0)) &&
                  cos.size(1) == q.size(2),
              "rope takes cos and sin [B or 1, S, R]; got ", cos.sizes(), " and ", sin.sizes());
  TORCH_CHECK(cos.size(2) % 2 == 0 && 0 < cos.size(2) && cos.size(2) <= q.size(3),
              "rope needs an even R of 2..D; got ", cos.size(2), " of ", q.size(3));
}

inline void check_weight(const char* name, const std::optional<at::Tensor>& weight, int64_t d) {
  TORCH_CHECK(!weight || (weight->dim() == 1 && weight->size(0) == d), name, " must be a float [", d, "]; got ",
              weight->sizes());
}

at::Tensor rope_kv_write(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& cos,
                         const at::Tensor& sin, const std::optional<at::Tensor>& q_weight,
                         const std::optional<at::Tensor>& k_weight, double eps, double offset,
                         const at::Tensor& k_cache, const at::Tensor& v_cache,
                         const std::optional<at::Tensor>& k_scale, const std::optional<at::Tensor>& v_scale,
                         const at::Tensor& slots) {
  check_rope(q, k, cos, sin);
  const int64_t d = q.size(3), r = cos.size(2), heads = q.size(1), kv_heads = k.size(1), tokens = q.size(2);
  check_weight("q_weight", q_weight, d);
  check_weight("k_weight", k_weight, d);
  check_written(k, v, k_cache, v_cache, k_scale, v_scale, slots, true);
  const auto inner = [](const at::Tensor& t) { return t.stride(-1) == 1 ? t : t.contiguous(); };
  const at::Tensor qc = inner(q), kc = inner(k), vc = inner(v), cc = inner(cos), sc = inner(sin);
  const Norm q_norm(q_weight, eps, offset), k_norm(k_weight, eps, offset);
  at::Tensor out = at::empty(q.sizes(), q.options().memory_format(at::MemoryFormat::Contiguous));
  HeadWriter* const write = head_writer(k_cache.scalar_type());
  const int64_t block_size = k_cache.size(2), count = k_cache.size(0) * block_size;
  const int64_t* const slot = slots.const_data_ptr<int64_t>();

  const auto table = [&](const at::Tensor& t, int64_t b, int64_t s, float* to) {
    const int64_t at = (t.size(0) > 1 ? b * t.stride(0) : 0) + s * t.stride(1);
    widen_row(t.scalar_type(), static_cast<const char*>(t.const_data_ptr()) + at * t.element_size(), r, to);
  };
  const auto token = [&](int64_t b, int64_t s, float* buffer) {
    float *const x = buffer, *const turn = x + padded(d), *const rise = turn + padded(r);
    table(cc, b, s, turn);
    table(sc, b, s, rise);
    const auto each = [&](const at::Tensor& from, int64_t n, const Norm* norm, const auto& take) {
      const TokenHeads read(from, b, s);
      for (int64_t h = 0; h < n; ++h) {
        widen_row(from.scalar_type(), read.at(h), d, x);
        if (norm) norm->apply(x, d), rotate(x, turn, rise, r);
        take(h);
      }
    };
    const TokenHeads to(out, b, s);
    each(qc, heads, &q_norm, [&](int64_t h) { round_row(q.scalar_type(), x, d, to.at(h)); });
    const int64_t place = slot[b * slots.stride(0) + s * slots.stride(1)];
    if (place < 0 || place >= count) return;
    const int64_t block = place / block_size, at = place % block_size;
    const auto put = [&](const at::Tensor& cache, const std::optional<at::Tensor>& scale) {
      float* const scales = scale ? scale->mutable_data_ptr<float>() + block * scale->stride(0) + at : nullptr;
      return [=, &cache, &scale, where = TokenHeads(cache, block, at)](int64_t h) {
        write(x, d, where.at(h), scales ? scales + h * scale->stride(1) : nullptr, cache.scalar_type());
      };
    };
    each(kc, kv_heads, &k_norm, put(k_cache, k_scale));
    each(vc, kv_heads, nullptr, put(v_cache, v_scale));
  };
  // As in `kv_write`: a task has at least 64 KB to read.
  const int64_t grain = 1 + (64 << 10) / (1 + (heads + 2 * kv_heads) * d * q.element_size());
  at::parallel_for(0, q.size(0) * tokens, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> buffer(padded(d) + 2 * padded(r));
    for (int64_t i = begin; i < end; ++i) token(i / tokens, i % tokens, buffer.data());
  });
  return out;
}

TORCH_LIBRARY_IMPL(optimizer, CPU, m) { m.impl("rope_kv_write", rope_kv_write); }

}  // namespace
