// Matrix products. For several tokens it is oneDNN's sgemm, bound by the multiply-add units. For
// one token (decode) every weight is read once for two FLOPs, so memory bounds it: each row of W is
// read in order, and sgemm's packing would only add traffic.
#include "kernels/cpu/simd_targets.h"
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/linear.cc"
#include "hwy/foreach_target.h"
// foreach_target.h comes first.
#include <oneapi/dnnl/dnnl.h>
#include <algorithm>
#include <new>

#include "hwy/highway.h"
#include "kernels/cpu/ops.h"

HWY_BEFORE_NAMESPACE();
namespace prefilld::kernels::cpu {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;
using F32 = hn::ScalableTag<float>;

float Dot(const float* HWY_RESTRICT a, const float* HWY_RESTRICT b, int64_t n) {
  const F32 d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  hn::Vec<F32> sum[4] = {hn::Zero(d), hn::Zero(d), hn::Zero(d), hn::Zero(d)};
  int64_t i = 0;
  for (; i + 4 * lanes <= n; i += 4 * lanes) {
    for (int j = 0; j < 4; ++j) {
      sum[j] = hn::MulAdd(hn::LoadU(d, a + i + j * lanes), hn::LoadU(d, b + i + j * lanes), sum[j]);
    }
  }
  for (; i + lanes <= n; i += lanes) {
    sum[0] = hn::MulAdd(hn::LoadU(d, a + i), hn::LoadU(d, b + i), sum[0]);
  }
  const auto total = hn::Add(hn::Add(sum[0], sum[1]), hn::Add(sum[2], sum[3]));
  float dot = hn::GetLane(hn::SumOfLanes(d, total));
  for (; i < n; ++i) dot += a[i] * b[i];
  return dot;
}

void OneTokenLinear(const LinearParams& p) {
  const float* x = static_cast<const float*>(p.x);
  const float* w = static_cast<const float*>(p.w);
  const float* bias = static_cast<const float*>(p.bias);
  float* y = static_cast<float*>(p.y);
#pragma omp parallel for schedule(static)
  for (int64_t o = 0; o < p.out_features; ++o) {
    const float before = (bias ? bias[o] : 0.0f) + (p.accumulate ? y[o] : 0.0f);
    y[o] = before + Dot(w + o * p.in_features, x, p.in_features);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace prefilld::kernels::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace prefilld::kernels::cpu {
namespace {

HWY_EXPORT(OneTokenLinear);

// y = bias, or y += bias, so that sgemm only has to add to it.
void ApplyBias(const LinearParams& p) {
  const float* bias = static_cast<const float*>(p.bias);
  float* y = static_cast<float*>(p.y);
#pragma omp parallel for schedule(static)
  for (int64_t t = 0; t < p.num_tokens; ++t) {
    float* row = y + t * p.out_features;
    if (p.accumulate) {
      for (int64_t o = 0; o < p.out_features; ++o) row[o] += bias[o];
    } else {
      std::copy_n(bias, p.out_features, row);
    }
  }
}

}  // namespace

void Linear(const LinearParams& params) {
  if (params.num_tokens == 1) {
    HWY_DYNAMIC_DISPATCH(OneTokenLinear)(params);
    return;
  }
  if (params.bias != nullptr) ApplyBias(params);
  const float beta = params.bias != nullptr || params.accumulate ? 1.0f : 0.0f;
  // Row-major, y = x * transposed w. The only failures are wrong arguments and lack of memory.
  const dnnl_status_t status = dnnl_sgemm(
      'N', 'T', params.num_tokens, params.out_features, params.in_features, 1.0f,
      static_cast<const float*>(params.x), params.in_features, static_cast<const float*>(params.w),
      params.in_features, beta, static_cast<float*>(params.y), params.out_features);
  if (status != dnnl_success) throw std::bad_alloc();
}

}  // namespace prefilld::kernels::cpu
#endif
