// Weight-only linears: a GEMV for a few rows, and weight decoding for many (GEMM on the decoded weight).
//
// A weight is decoded once for up to four activation rows. int4 blocks of 32 weights are 16 bytes: byte i holds weight
// i (low) and i + 16 (high), stored as q + 8, so that a block decodes with one mask and one shift and activations need
// no shuffle.
#pragma once
#include <ATen/ops/from_blob.h>
#include <ATen/ops/linear.h>
#include <torch/library.h>

#include "vector.h"

namespace {

// A weight type: what it is stored in, bytes of 32 weights, the scales these may have at most, what is taken off a
// decoded weight, what a unit of it stands for, and the decoding of 32 weights to V float vectors.
struct Int4 {
  static constexpr at::ScalarType type = at::kByte;
  static constexpr int bytes = 16, scales = 1;
  static constexpr float offset = 8, unit = 1;
  static inline void block(const uint8_t* p, vf* out) {
    v16 b = load<v16>(p);
    v16 parts[2] = {b & 15, b >> 4};
#if defined(__AVX512F__)
    for (int i = 0; i < 2; ++i) out[i] = (vf)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32((__m128i)parts[i]));
#elif defined(__AVX2__)
    for (int i = 0; i < 2; ++i) {
      out[2 * i] = (vf)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32((__m128i)parts[i]));
      out[2 * i + 1] = (vf)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128((__m128i)parts[i], 8)));
    }
#else
    for (int i = 0; i < V; ++i)
      out[i] = __builtin_convertvector(load<vb>(reinterpret_cast<uint8_t*>(parts) + i * W), vf);
#endif
  }
};
struct Int8 {
  static constexpr at::ScalarType type = at::kChar;
  static constexpr int bytes = 32, scales = 1;
  static constexpr float offset = 0, unit = 1;
  static inline void block(const uint8_t* p, vf* out) {
    for (int i = 0; i < V; ++i) out[i] = widen_signed(p + i * W);
  }
};
struct BFloat16 {
  static constexpr at::ScalarType type = at::kBFloat16;
  static constexpr int bytes = 64, scales = 1;
  static constexpr float offset = 0, unit = 1;
  static inline void block(const uint8_t* p, vf* out) {
    for (int i = 0; i < V; ++i) out[i] = widen_bfloat16(p + i * W * 2);
  }
};

struct Weight {
  const uint8_t* data;  // [N, K / 32 * bytes]
  const float* scale;   // [N, G] or null: all ones
  const float* zero;    // [N, G] or null: all zeros, in units of q
  const float* bias;    // [N] or null
  int64_t n, k, groups;
  const uint8_t* codes = nullptr;  // [N, G]: scales of one byte, looked up in `table` and multiplied by `factor`
  const float* table = nullptr;
  float factor = 1;
  float scale_at(int64_t i) const { return codes ? table[codes[i]] * factor : scale ? scale[i] : 1.f; }
};

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
            if constexpr (std::is_same_v<T, float>) {
              std::memcpy(o + i * W, &v, sizeof(vf));
            } else {
              for (int j = 0; j < W; ++j) o[i * W + j] = static_cast<T>(v[j]);
            }
          }
        }
      }
    }
  });
}

#ifdef __AVX512BF16__
constexpr bool NATIVE_BFLOAT16 = true;
#else
constexpr bool NATIVE_BFLOAT16 = false;
#endif
constexpr int64_t GEMM_ROWS = 16;             // from here decoding once and calling sgemm is faster
constexpr int64_t GEMM_ELEMENTS = 8 << 20;    // weights decoded at a time: 32 MB

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
  const Floats xf(xc), bf(bc);
  Weight w = checked<D>(x, data, scale, zero, bias, bf.data, table != nullptr);
  w.table = table, w.factor = factor;
  const int64_t k = w.k, n = w.n, m = x.numel() / k;
  auto shape = x.sizes().vec();
  shape.back() = n;
  at::Tensor out = at::empty(shape, x.options());
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
  // Many rows: decode once and call a GEMM, in bfloat16 where the processor multiplies it, else in float32.
  const bool native = NATIVE_BFLOAT16 && x.scalar_type() == at::kBFloat16 && (!bias || bc.scalar_type() == at::kBFloat16);
  const at::Tensor rows = native ? xc.view({m, k}) : at::from_blob(const_cast<float*>(xf.data), {m, k}, at::kFloat);
  const at::Tensor wide_bias = bf.data ? at::from_blob(const_cast<float*>(bf.data), {n}, at::kFloat) : at::Tensor();
  const at::Tensor flat = out.view({m, n});
  const int64_t step = std::min<int64_t>(n, std::max<int64_t>(1, GEMM_ELEMENTS / k));
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
