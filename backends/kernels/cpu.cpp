// CPU kernels: weight-only linears for a few rows (GEMV) and weight decoding for many (GEMM on the decoded weight),
// and attention of one new token over the cache.
//
// Vectors are GCC vector extensions, so one source serves AVX2, AVX-512 and NEON. Activations are widened to float32
// once, products are accumulated in float32 and rounded once to the activation type. A weight is decoded once for up
// to four activation rows. int4 blocks of 32 weights are 16 bytes: byte i holds weight i (low) and i + 16 (high),
// stored as q + 8, so that a block decodes with one mask and one shift and activations need no shuffle.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/linear.h>
#include <torch/library.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>
#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace {

#ifdef __AVX512F__
constexpr int W = 16;
#else
constexpr int W = 8;
#endif
constexpr int BLOCK = 32;
constexpr int V = BLOCK / W;       // vectors in a block
constexpr int MAX_ROWS = 4;        // activation rows that share one decoding of the weight
typedef float vf __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint8_t vb __attribute__((vector_size(W)));
typedef int8_t vs __attribute__((vector_size(W)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));
typedef uint8_t v16 __attribute__((vector_size(16)));

template <typename T>
inline T load(const void* p) {
  T v;
  std::memcpy(&v, p, sizeof(T));
  return v;
}

// Widening a byte vector: GCC 12 scalarizes __builtin_convertvector from 8 bits, which costs a factor of five.
inline vf widen_signed(const uint8_t* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load<__m128i>(p)));
#elif defined(__AVX2__)
  return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  return __builtin_convertvector(load<vs>(p), vf);
#endif
}
inline vf widen_bfloat16(const uint8_t* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(load<__m256i>(p)), 16);
#elif defined(__AVX2__)
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(load<__m128i>(p)), 16);
#else
  vu bits = __builtin_convertvector(load<vh>(p), vu) << 16;
  return load<vf>(&bits);
#endif
}

inline float sum(vf v) {
  float s = 0;
  for (int i = 0; i < W; ++i) s += v[i];
  return s;
}

// A weight type: what it is stored in, bytes of 32 weights, and their decoding to V float vectors.
struct Int4 {
  static constexpr at::ScalarType type = at::kByte;
  static constexpr int bytes = 16;
  static constexpr float offset = 8;
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
  static constexpr int bytes = 32;
  static constexpr float offset = 0;
  static inline void block(const uint8_t* p, vf* out) {
    for (int i = 0; i < V; ++i) out[i] = widen_signed(p + i * W);
  }
};
struct BFloat16 {
  static constexpr at::ScalarType type = at::kBFloat16;
  static constexpr int bytes = 64;
  static constexpr float offset = 0;
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
};

// out[m, n] = sum_g scale[n, g] * (sum_k q x - (offset + zero[n, g]) * sum_k x)
template <typename D, int M>
void rows(const Weight& w, const float* x, const float* xsum, float* out, int64_t begin, int64_t end) {
  const int64_t blocks = w.k / BLOCK / w.groups;
  for (int64_t n = begin; n < end; ++n) {
    const uint8_t* p = w.data + n * (w.k / BLOCK) * D::bytes;
    vf total[M] = {};
    float rest[M] = {};
    for (int64_t g = 0; g < w.groups; ++g) {
      vf acc[M][V] = {};
      const float* xg = x + g * blocks * BLOCK;
      for (int64_t b = 0; b < blocks; ++b, p += D::bytes) {
        vf q[V];
        D::block(p, q);
        for (int m = 0; m < M; ++m)
          for (int i = 0; i < V; ++i) acc[m][i] += q[i] * load<vf>(xg + m * w.k + b * BLOCK + i * W);
      }
      const float s = w.scale ? w.scale[n * w.groups + g] : 1.f;
      const float z = D::offset + (w.zero ? w.zero[n * w.groups + g] : 0.f);
      for (int m = 0; m < M; ++m) {
        for (int i = 1; i < V; ++i) acc[m][0] += acc[m][i];
        total[m] += acc[m][0] * s;
        rest[m] += s * z * xsum[m * w.groups + g];
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
  const int64_t blocks = w.k / BLOCK / w.groups;
  at::parallel_for(0, count, 16, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t n = first + r;
      const uint8_t* p = w.data + n * (w.k / BLOCK) * D::bytes;
      T* o = out + r * w.k;
      for (int64_t g = 0; g < w.groups; ++g) {
        const float s = w.scale ? w.scale[n * w.groups + g] : 1.f;
        const float z = D::offset + (w.zero ? w.zero[n * w.groups + g] : 0.f);
        for (int64_t b = 0; b < blocks; ++b, p += D::bytes, o += BLOCK) {
          vf q[V];
          D::block(p, q);
          for (int i = 0; i < V; ++i) {
            const vf v = (q[i] - z) * s;
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

// Run `body` with T and `to`, a pointer into `t`, for the two 16-bit floating types.
#define WITH_REDUCED_TYPE(t, body)                                                   \
  if ((t).scalar_type() == at::kBFloat16) {                                            \
    using T = at::BFloat16;                                                            \
    T* to = static_cast<T*>(const_cast<void*>((t).const_data_ptr()));                                   \
    body;                                                                              \
  } else {                                                                             \
    TORCH_CHECK((t).scalar_type() == at::kHalf, "activations must be float32, bfloat16 or float16"); \
    using T = at::Half;                                                                \
    T* to = static_cast<T*>(const_cast<void*>((t).const_data_ptr()));                                   \
    body;                                                                              \
  }

// A contiguous tensor's values in float32: in place when they are, widened into a buffer otherwise. No dispatcher:
// a decode step calls this for every layer, and two ATen calls would cost more than the widening.
struct Floats {
  const float* data = nullptr;
  std::vector<float> wide;
  explicit Floats(const at::Tensor& t) {
    if (!t.defined()) return;
    if (t.scalar_type() == at::kFloat) {
      data = t.const_data_ptr<float>();
      return;
    }
    wide.resize(t.numel());
    WITH_REDUCED_TYPE(t, for (int64_t i = 0; i < t.numel(); ++i) wide[i] = static_cast<float>(to[i]));
    data = wide.data();
  }
  Floats(const Floats&) = delete;
};

#ifdef __AVX512BF16__
constexpr bool NATIVE_BFLOAT16 = true;
#else
constexpr bool NATIVE_BFLOAT16 = false;
#endif
constexpr int64_t GEMM_ROWS = 16;             // from here decoding once and calling sgemm is faster
constexpr int64_t GEMM_ELEMENTS = 8 << 20;    // weights decoded at a time: 32 MB

template <typename D>
at::Tensor linear(const at::Tensor& x, const at::Tensor& data, const at::Tensor* scale, const at::Tensor* zero,
                  const std::optional<at::Tensor>& bias) {
  TORCH_CHECK(x.dim() >= 1 && data.dim() == 2 && data.is_contiguous(), "weights must be a contiguous matrix");
  TORCH_CHECK(data.scalar_type() == D::type, "weights must be ", D::type, ", got ", data.scalar_type());
  const int64_t k = x.size(-1), n = data.size(0), m = k ? x.numel() / k : 0;
  const int64_t groups = scale ? scale->size(1) : 1;
  TORCH_CHECK(data.size(1) * data.element_size() * BLOCK == k * D::bytes, "x has ", k, " features, the weight has ",
              data.size(1) * data.element_size() * BLOCK / D::bytes);
  TORCH_CHECK(k > 0 && groups > 0 && k % (BLOCK * groups) == 0, k, " features in ", groups,
              " groups: every group must be a multiple of ", BLOCK);
  for (const at::Tensor* t : {scale, zero})
    TORCH_CHECK(!t || (t->scalar_type() == at::kFloat && t->is_contiguous() && t->dim() == 2 && t->size(0) == n &&
                       t->size(1) == groups), "scale and zero must be contiguous float32 [N, G]");
  TORCH_CHECK(!bias || bias->numel() == n, "bias must have one value for each of the ", n, " rows");
  auto shape = x.sizes().vec();
  shape.back() = n;
  const at::Tensor xc = x.contiguous(), bc = bias ? bias->contiguous() : at::Tensor();  // outlive their Floats
  const Floats xf(xc), bf(bc);
  const Weight w{static_cast<const uint8_t*>(data.const_data_ptr()), scale ? scale->const_data_ptr<float>() : nullptr,
                 zero ? zero->const_data_ptr<float>() : nullptr, bf.data, n, k, groups};
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

// One row of an attention cache, widened to float32 as it is read.
template <typename T>
inline vf widen(const T* p) {
  if constexpr (std::is_same_v<T, float>) {
    return load<vf>(p);
  } else if constexpr (std::is_same_v<T, at::BFloat16>) {
    return widen_bfloat16(reinterpret_cast<const uint8_t*>(p));
  } else {
    vf v;
    for (int i = 0; i < W; ++i) v[i] = static_cast<float>(p[i]);
    return v;
  }
}

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

}  // namespace

TORCH_LIBRARY_IMPL(optimizer, CPU, m) {
  m.impl("w4a16_linear", w4a16_linear);
  m.impl("w8a16_linear", w8a16_linear);
  m.impl("bf16_linear", bf16_linear);
  m.impl("decode_attention", decode_attention);
}
