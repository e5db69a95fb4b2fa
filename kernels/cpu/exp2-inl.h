// 2^x in fp32, compiled once per instruction set.
#if defined(PREFILLD_KERNELS_CPU_EXP2_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef PREFILLD_KERNELS_CPU_EXP2_INL_H_
#undef PREFILLD_KERNELS_CPU_EXP2_INL_H_
#else
#define PREFILLD_KERNELS_CPU_EXP2_INL_H_
#endif

#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace prefilld::kernels::cpu {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

inline constexpr float kLog2E = 1.44269504088896341f;

// 2^x for x <= 126: relative error below 2e-7; 0 below 2^-126; NaN stays NaN. The polynomial is the
// minimax approximation of 2^f on [-1/2, 1/2] with its constant term held at 1.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V Exp2(D d, V x) {
  const hn::Rebind<int32_t, D> di;
  const V n = hn::Round(x);
  const V f = hn::Sub(x, n);
  V p = hn::Set(d, 1.326472763e-3f);
  p = hn::MulAdd(p, f, hn::Set(d, 9.671512646e-3f));
  p = hn::MulAdd(p, f, hn::Set(d, 5.550733742e-2f));
  p = hn::MulAdd(p, f, hn::Set(d, 2.402224209e-1f));
  p = hn::MulAdd(p, f, hn::Set(d, 6.931469776e-1f));
  p = hn::MulAdd(p, f, hn::Set(d, 1.0f));
  const auto exponent = hn::ShiftLeft<23>(hn::Add(hn::ConvertTo(di, n), hn::Set(di, 127)));
  const V result = hn::Mul(p, hn::BitCast(d, exponent));
  return hn::IfThenZeroElse(hn::Lt(x, hn::Set(d, -126.0f)), result);
}

}  // namespace HWY_NAMESPACE
}  // namespace prefilld::kernels::cpu
HWY_AFTER_NAMESPACE();

#endif  // PREFILLD_KERNELS_CPU_EXP2_INL_H_
