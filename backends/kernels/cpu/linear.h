// Weight-only linears: a GEMV for a few rows, which decodes a weight once for up to four of them, and a GEMM for many:
// our own for bfloat16 rows where there is an instruction (bf16_gemm.h), else ATen's on the weight decoded in parts, in
// bfloat16 with AMX and in float32 without.
#pragma once
#include <ATen/ops/from_blob.h>
#include <ATen/ops/linear.h>
#include <torch/library.h>

#include "bf16_gemm.h"
#include "weights.h"

namespace {

// out[m, n] = sum_g scale[n, g] * (sum_k q x - (offset + zero[n, g]) * sum_k x)
template <typename D, int M>
void rows(const Weight& w, const float* x, const float* xsum, float* out, int64_t begin, int64_t end) {
  const int64_t spans = w.groups / D::scales, blocks = w.k / BLOCK / spans;
  constexpr int P = V / D::scales;  // vectors of a block that share a scale
  for (int64_t n = begin; n < end; ++n) {
    const uint8_t* p = w.data + n * (w.k / BLOCK) * D::bytes;
    vf total[M] = {};
    float rest[M] = {};
    for (int64_t g = 0; g < spans; ++g) {
      vf acc[M][V] = {};
      const float* xg = x + g * blocks * BLOCK;
      for (int64_t b = 0; b < blocks; ++b, p += D::bytes) {
        vf q[V];
        D::block(p, q);
        for (int m = 0; m < M; ++m)
          for (int i = 0; i < V; ++i) acc[m][i] += q[i] * load<vf>(xg + m * w.k + b * BLOCK + i * W);
      }
      for (int part = 0; part < D::scales; ++part) {
        const int64_t i = g * D::scales + part;
        const float s = w.scale_at(n * w.groups + i);
        const float z = D::offset + (w.zero ? w.zero[n * w.groups + i] : 0.f);
        for (int m = 0; m < M; ++m) {
          vf* const sums = acc[m] + part * P;
          for (int j = 1; j < P; ++j) sums[0] += sums[j];
          total[m] += sums[0] * D::unit * s;
          rest[m] += s * z * xsum[m * w.groups + i];
        }
      }
    }
    for (int m = 0; m < M; ++m) out[m * w.n + n] = sum(total[m]) - rest[m] + (w.bias ? w.bias[n] : 0.f);
  }
}

template <typename D>
void gemv(const Weight& w, const float* x, int64_t m, float* out) {
  std::vector<float> xsum(m * w.groups);
  const int64_t g = w.k / w.groups;
  for (int64_t i = 0; i < m * w.groups; ++i) {
    vf s = {};
    for (int64_t j = 0; j < g; j += W) s += load<vf>(x + i * g + j);
    xsum[i] = sum(s);
  }
  // One task moves at least 64 KB of weights: below that a second thread costs more than it brings.
  const int64_t grain = std::max<int64_t>(1, (64 << 10) / std::max<int64_t>(1, w.k / BLOCK * D::bytes));
  at::parallel_for(0, w.n, grain, [&](int64_t begin, int64_t end) {
    int64_t i = 0;
    for (; i + 4 <= m; i += 4) rows<D, 4>(w, x + i * w.k, &xsum[i * w.groups], out + i * w.n, begin, end);
    for (; i + 2 <= m; i += 2) rows<D, 2>(w, x + i * w.k, &xsum[i * w.groups], out + i * w.n, begin, end);
    for (; i < m; ++i) rows<D, 1>(w, x + i * w.k, &xsum[i * w.groups], out + i * w.n, begin, end);
  });
}

// Decode rows [first, first + count) to [count, K], each weight rounded once to T.
template <typename D, typename T>
void decode(const Weight& w, int64_t first, int64_t count, T* out) {
  const int64_t spans = w.groups / D::scales, blocks = w.k / BLOCK / spans;
  at::parallel_for(0, count, 16, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t n = first + r;
      const uint8_t* p = w.data + n * (w.k / BLOCK) * D::bytes;
      T* o = out + r * w.k;
      for (int64_t g = 0; g < spans; ++g) {
        float s[D::scales], z[D::scales];
        for (int part = 0; part < D::scales; ++part) {
          const int64_t i = n * w.groups + g * D::scales + part;
          s[part] = w.scale_at(i);
          z[part] = D::offset + (w.zero ? w.zero[i] : 0.f);
        }
        for (int64_t b = 0; b < blocks; ++b, p += D::bytes, o += BLOCK) {
          vf q[V];
          D::block(p, q);
          for (int i = 0; i < V; ++i) {
            const vf v = (q[i] - z[i * D::scales / V]) * D::unit * s[i * D::scales / V];
            store(o + i * W, v, W);
          }
        }
      }
    }
  });
}

#ifdef __AMX_BF16__
constexpr bool NATIVE_BFLOAT16 = true;
#else
constexpr bool NATIVE_BFLOAT16 = false;
#endif
constexpr int64_t GEMM_ROWS = 16;  // from here decoding once and calling ATen is faster
// Weights decoded at a time: 2 MB in float32, but at least 256 columns of the output. 128 rows by 6912 x 1024 then take
// 20 ms on a Zen 4 core, and 28 with 32 MB, which leave the cache and are mapped anew; by 4096 x 14336 they take 264 ms
// with 36 columns and 200 with 256.
constexpr int64_t GEMM_ELEMENTS = 512 << 10, GEMM_COLUMNS = 256;

// A weight of type D as it meets `x`, after every check: a wrong operand raises.
template <typename D>
Weight checked(const at::Tensor& x, const at::Tensor& data, const at::Tensor* scale, const at::Tensor* zero,
               const std::optional<at::Tensor>& bias, const float* wide_bias, bool coded = false) {
  TORCH_CHECK(x.dim() >= 1 && data.dim() == 2 && data.is_contiguous(), "weights must be a contiguous matrix");
  TORCH_CHECK(data.scalar_type() == D::type, "weights must be ", D::type, ", got ", data.scalar_type());
  const int64_t k = x.size(-1), n = data.size(0), groups = scale ? scale->size(1) : 1;
  TORCH_CHECK(data.size(1) * data.element_size() * BLOCK == k * D::bytes, "x has ", k, " features, the weight has ",
              data.size(1) * data.element_size() * BLOCK / D::bytes);
  TORCH_CHECK(k > 0 && groups > 0 && k % BLOCK == 0 && k * D::scales % (BLOCK * groups) == 0, k, " features in ", groups,
              " groups: every group must be a multiple of ", BLOCK / D::scales);
  for (const at::Tensor* t : {scale, zero})
    TORCH_CHECK(!t || ((t->scalar_type() == at::kFloat || (coded && t == scale)) && t->is_contiguous() && t->dim() == 2 &&
                       t->size(0) == n && t->size(1) == groups), "scale and zero must be contiguous float32 [N, G]");
  TORCH_CHECK(!bias || bias->numel() == n, "bias must have one value for each of the ", n, " rows");
  const void* scales = scale ? scale->const_data_ptr() : nullptr;
  return {static_cast<const uint8_t*>(data.const_data_ptr()), coded ? nullptr : static_cast<const float*>(scales),
          zero ? zero->const_data_ptr<float>() : nullptr, wide_bias, n, k, groups,
          coded ? static_cast<const uint8_t*>(scales) : nullptr};
}

// `table` and `factor` decode scales of one byte.
template <typename D>
at::Tensor linear(const at::Tensor& x, const at::Tensor& data, const at::Tensor* scale, const at::Tensor* zero,
                  const std::optional<at::Tensor>& bias, const float* table = nullptr, float factor = 1) {
  const at::Tensor xc = x.contiguous(), bc = bias ? bias->contiguous() : at::Tensor();  // outlive their Floats
  const Floats bf(bc);
  Weight w = checked<D>(x, data, scale, zero, bias, bf.data, table != nullptr);
  w.table = table, w.factor = factor;
  const int64_t k = w.k, n = w.n, m = x.numel() / k;
  auto shape = x.sizes().vec();
  shape.back() = n;
  at::Tensor out = at::empty(shape, x.options());
#ifdef BFLOAT16_GEMM
  if (x.scalar_type() == at::kBFloat16 && m >= BFLOAT16_GEMM_ROWS && n > 0) {
    bf16_gemm(w, PairPanel::fill<D>, k / BLOCK * D::bytes, xc.const_data_ptr<at::BFloat16>(), m,
              out.mutable_data_ptr<at::BFloat16>());
    return out;
  }
#endif
  const Floats xf(xc);
  if (m < GEMM_ROWS) {
    if (x.scalar_type() == at::kFloat) {
      gemv<D>(w, xf.data, m, out.mutable_data_ptr<float>());
    } else {
      std::vector<float> wide(m * n);
      gemv<D>(w, xf.data, m, wide.data());
      WITH_REDUCED_TYPE(out, for (int64_t i = 0; i < m * n; ++i) to[i] = static_cast<T>(wide[i]));
    }
    return out;
  }
  // Many rows: decode once and call a GEMM.
  const at::ScalarType kind = x.scalar_type();
  const bool native = NATIVE_BFLOAT16 && kind == at::kBFloat16 && (!bias || bc.scalar_type() == kind);
  const at::Tensor rows = native ? xc.view({m, k}) : at::from_blob(const_cast<float*>(xf.data), {m, k}, at::kFloat);
  const at::Tensor wide_bias = bf.data ? at::from_blob(const_cast<float*>(bf.data), {n}, at::kFloat) : at::Tensor();
  const at::Tensor flat = out.view({m, n});
  const int64_t step = std::min<int64_t>(n, std::max(GEMM_COLUMNS, GEMM_ELEMENTS / k));
  const at::Tensor decoded = at::empty({step, k}, rows.options());
  for (int64_t first = 0; first < n; first += step) {
    const int64_t count = std::min(step, n - first);
    if (native) {
      decode<D>(w, first, count, decoded.mutable_data_ptr<at::BFloat16>());
    } else {
      decode<D>(w, first, count, decoded.mutable_data_ptr<float>());
    }
    std::optional<at::Tensor> part_bias;
    if (bias) part_bias = native ? bc.narrow(0, first, count) : wide_bias.narrow(0, first, count);
    flat.narrow(1, first, count).copy_(at::linear(rows, decoded.narrow(0, 0, count), part_bias));
  }
  return out;
}

at::Tensor w4a16_linear(const at::Tensor& x, const at::Tensor& data, const at::Tensor& scale,
                        const std::optional<at::Tensor>& zero, const std::optional<at::Tensor>& bias) {
  return linear<Int4>(x, data, &scale, zero ? &*zero : nullptr, bias);
}
at::Tensor w8a16_linear(const at::Tensor& x, const at::Tensor& data, const at::Tensor& scale,
                        const std::optional<at::Tensor>& zero, const std::optional<at::Tensor>& bias) {
  return linear<Int8>(x, data, &scale, zero ? &*zero : nullptr, bias);
}
at::Tensor bf16_linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  return linear<BFloat16>(x, weight, nullptr, nullptr, bias);
}

TORCH_LIBRARY_IMPL(optimizer, CPU, m) {
  m.impl("w4a16_linear", w4a16_linear);
  m.impl("w8a16_linear", w8a16_linear);
  m.impl("bf16_linear", bf16_linear);
}

}  // namespace
