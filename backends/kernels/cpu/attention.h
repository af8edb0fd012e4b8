// Attention of one new token over a static key-value cache.
#pragma once
#include <torch/library.h>

#include <limits>

#include "vector.h"

namespace {

// Attention of the G query heads of one KV head; `visible` lists the positions that may be seen.
template <typename T>
void attend(const T* q, const T* k, const T* v, T* out, const std::vector<int64_t>& visible, int64_t groups, int64_t d,
            float scale, std::vector<float>& buffer) {
  const int64_t n = visible.size(), vectors = d / W;
  buffer.resize(groups * (n + d));
  float* scores = buffer.data();             // [G, n]
  float* sums = buffer.data() + groups * n;  // [G, D]
  std::fill(sums, sums + groups * d, 0.f);
  for (int64_t i = 0; i < n; ++i) {
    const T* key = k + visible[i] * d;
    for (int64_t g = 0; g < groups; ++g) {
      vf acc = {};
      for (int64_t j = 0; j < vectors; ++j) acc += widen(q + g * d + j * W) * widen(key + j * W);
      scores[g * n + i] = sum(acc) * scale;
    }
  }
  for (int64_t g = 0; g < groups; ++g) {
    float* row = scores + g * n;
    float top = -std::numeric_limits<float>::infinity(), total = 0;
    for (int64_t i = 0; i < n; ++i) top = row[i] > top || std::isnan(row[i]) ? row[i] : top;
    for (int64_t i = 0; i < n; ++i) total += row[i] = std::exp(row[i] - top);
    for (int64_t i = 0; i < n; ++i) row[i] /= total;
  }
  for (int64_t i = 0; i < n; ++i) {
    const T* value = v + visible[i] * d;
    for (int64_t g = 0; g < groups; ++g) {
      const float weight = scores[g * n + i];
      for (int64_t j = 0; j < vectors; ++j) {
        vf sum_j = load<vf>(sums + g * d + j * W) + weight * widen(value + j * W);
        std::memcpy(sums + g * d + j * W, &sum_j, sizeof(vf));
      }
    }
  }
  for (int64_t i = 0; i < groups * d; ++i) out[i] = static_cast<T>(sums[i]);
}

template <typename T>
void attend_all(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& mask,
                at::Tensor& out, float scale) {
  const int64_t heads = q.size(1), kv_heads = k.size(1), positions = k.size(2), d = q.size(3), groups = heads / kv_heads;
  const T *qp = q.const_data_ptr<T>(), *kp = k.const_data_ptr<T>(), *vp = v.const_data_ptr<T>();
  const bool* seen = mask.const_data_ptr<bool>();
  T* op = out.mutable_data_ptr<T>();
  at::parallel_for(0, q.size(0) * kv_heads, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> buffer;
    std::vector<int64_t> visible;
    for (int64_t i = begin; i < end; ++i) {
      visible.clear();
      for (int64_t s = 0; s < positions; ++s)
        if (seen[i / kv_heads * positions + s]) visible.push_back(s);
      const int64_t cache = i * positions * d, row = i * groups * d;
      attend<T>(qp + row, kp + cache, vp + cache, op + row, visible, groups, d, scale, buffer);
    }
  });
}

at::Tensor decode_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& mask,
                            double scale) {
  TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && q.size(2) == 1 && k.sizes() == v.sizes() && q.size(0) == k.size(0) &&
                  q.size(3) == k.size(3) && k.size(1) > 0 && q.size(1) % k.size(1) == 0,
              "q must be [B, H, 1, D], k and v [B, H_kv, S, D] with H a multiple of H_kv; got ", q.sizes(), " and ",
              k.sizes());
  TORCH_CHECK(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(), "q, k and v differ in type");
  TORCH_CHECK(q.size(3) % W == 0, "head size ", q.size(3), " must be a multiple of ", W);
  TORCH_CHECK(mask.scalar_type() == at::kBool && mask.numel() == q.size(0) * k.size(2),
              "mask must be bool [B, 1, 1, S]; got ", mask.sizes());
  const at::Tensor qc = q.contiguous(), kc = k.contiguous(), vc = v.contiguous(), mc = mask.contiguous();
  at::Tensor out = at::empty(q.sizes(), q.options());
  switch (q.scalar_type()) {
    case at::kFloat: attend_all<float>(qc, kc, vc, mc, out, scale); break;
    case at::kBFloat16: attend_all<at::BFloat16>(qc, kc, vc, mc, out, scale); break;
    case at::kHalf: attend_all<at::Half>(qc, kc, vc, mc, out, scale); break;
    default: TORCH_CHECK(false, "q must be float32, bfloat16 or float16");
  }
  return out;
}

TORCH_LIBRARY_IMPL(optimizer, CPU, m) { m.impl("decode_attention", decode_attention); }

}  // namespace
