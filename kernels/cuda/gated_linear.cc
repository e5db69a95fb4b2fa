#include "kernels/cuda/gated_linear.h"

#include <algorithm>
#include <limits>

#include "kernels/cuda/gated_linear/sm90/fused.h"
#include "kernels/cuda/layer_ops.h"
#include "kernels/cuda/rivals.h"

namespace prefilld::kernels::cuda {
namespace {

LinearParams ProductOf(const GatedLinearParams& p) {
  return {.x = p.x,
          .w = p.w,
          .y = p.gate_up,
          .num_tokens = p.num_tokens,
          .in_features = p.in_features,
          .out_features = 2 * p.intermediate};
}

// In the currency of the product.
cublasStatus_t ToCublas(cudaError_t error) {
  if (error == cudaSuccess) return CUBLAS_STATUS_SUCCESS;
  return error == cudaErrorInvalidValue ? CUBLAS_STATUS_NOT_SUPPORTED
                                        : CUBLAS_STATUS_EXECUTION_FAILED;
}

}  // namespace

GatedLinearLauncher::GatedLinearLauncher(LinearLauncher* linear) : linear_(linear) {
  int device = 0;
  int major = 0;
  int num_sms = 0;
  const bool known =
      cudaGetDevice(&device) == cudaSuccess &&
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
      cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device) == cudaSuccess;
  if (known && major == 9) num_sms_ = num_sms;
}

bool GatedLinearLauncher::CanFuse(const GatedLinearParams& params) const {
  return num_sms_ > 0 && sm90::Supports(params);
}

cublasStatus_t GatedLinearLauncher::Launch(const GatedLinearParams& params, cudaStream_t stream,
                                           GatedLinearPath path) {
  if (path == GatedLinearPath::kFastest) {
    path = IsFused(params) ? GatedLinearPath::kFused : GatedLinearPath::kTwoSteps;
  }
  if (path == GatedLinearPath::kFused) {
    return CanFuse(params) ? ToCublas(sm90::LaunchGatedLinear(params, num_sms_, stream))
                           : CUBLAS_STATUS_NOT_SUPPORTED;
  }
  const cublasStatus_t status = linear_->Launch(ProductOf(params), stream);
  if (status != CUBLAS_STATUS_SUCCESS) return status;
  return ToCublas(LaunchSwiGlu({.gate_up = params.gate_up,
                                .y = params.y,
                                .num_tokens = params.num_tokens,
                                .intermediate = params.intermediate},
                               stream));
}

cublasStatus_t GatedLinearLauncher::Tune(const GatedLinearParams& params, cudaStream_t stream) {
  cublasStatus_t status = linear_->Tune(ProductOf(params), stream);
  if (status != CUBLAS_STATUS_SUCCESS || params.num_tokens == 0 || !CanFuse(params)) return status;
  struct Rival {
    GatedLinearPath path;
    std::vector<float> ms;
  };
  Rival rivals[] = {{GatedLinearPath::kTwoSteps, {}}, {GatedLinearPath::kFused, {}}};
  const int repetitions =
      TuneRepetitions(params.num_tokens, params.in_features, 2 * params.intermediate);
  for (int round = 0; round < kTuneRounds; ++round) {
    for (Rival& rival : rivals) {
      float ms = 0.0f;
      status = TimeLaunches([&] { return Launch(params, stream, rival.path); }, repetitions, stream,
                            &ms);
      if (status == CUBLAS_STATUS_EXECUTION_FAILED) return status;
      if (status == CUBLAS_STATUS_SUCCESS) rival.ms.push_back(ms);
    }
  }
  // A way that cannot run after all has lost.
  const auto median = [](const Rival& rival) {
    return rival.ms.empty() ? std::numeric_limits<float>::max() : MedianMs(rival.ms);
  };
  std::erase_if(tunings_, [&](const Tuning& tuning) {
    return tuning.in_features == params.in_features && tuning.intermediate == params.intermediate;
  });
  tunings_.push_back({.num_tokens = params.num_tokens,
                      .in_features = params.in_features,
                      .intermediate = params.intermediate,
                      .fused = median(rivals[1]) < median(rivals[0])});
  return CUBLAS_STATUS_SUCCESS;
}

bool GatedLinearLauncher::IsFused(const GatedLinearParams& params) const {
  return std::any_of(tunings_.begin(), tunings_.end(), [&](const Tuning& tuning) {
    return tuning.fused && tuning.in_features == params.in_features &&
           tuning.intermediate == params.intermediate &&
           TuningHolds(tuning.num_tokens, params.num_tokens) && CanFuse(params);
  });
}

}  // namespace prefilld::kernels::cuda
