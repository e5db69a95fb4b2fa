#include "kernels/cuda/gated_linear.h"

#include <algorithm>
#include <limits>

#include "kernels/cuda/gated_linear/sm90/fused.h"
#include "kernels/cuda/layer_ops.h"
#include "kernels/cuda/tuning.h"

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

}  // namespace

bool GatedLinearLauncher::CanFuse(const GatedLinearParams& params, GpuTraits* gpu) const {
  return CurrentGpu(gpu) == cudaSuccess && gpu->is_hopper() && sm90::Supports(params);
}

LaunchStatus GatedLinearLauncher::Launch(const GatedLinearParams& params, cudaStream_t stream,
                                         KernelPath path) {
  if (path == KernelPath::kFastest) {
    path = IsFused(params) ? KernelPath::kHopper : KernelPath::kPortable;
  }
  if (path == KernelPath::kHopper) {
    GpuTraits gpu;
    return CanFuse(params, &gpu) ? sm90::LaunchGatedLinear(params, gpu.num_sms, stream)
                                 : cudaErrorInvalidValue;
  }
  if (const LaunchStatus status = linear_->Launch(ProductOf(params), stream); !status.ok()) {
    return status;
  }
  return LaunchSwiGlu({.gate_up = params.gate_up,
                       .y = params.y,
                       .num_tokens = params.num_tokens,
                       .intermediate = params.intermediate},
                      stream);
}

LaunchStatus GatedLinearLauncher::Tune(const GatedLinearParams& params, cudaStream_t stream) {
  if (const LaunchStatus status = linear_->Tune(ProductOf(params), stream); !status.ok()) {
    return status;
  }
  GpuTraits gpu;
  if (params.num_tokens == 0 || !CanFuse(params, &gpu)) return {};
  Candidate<KernelPath> two_steps{KernelPath::kPortable, {}};
  Candidate<KernelPath> fused{KernelPath::kHopper, {}};
  const int repetitions =
      TuneRepetitions(params.num_tokens, params.in_features, 2 * params.intermediate);
  for (int round = 0; round < kTuneRounds; ++round) {
    for (Candidate<KernelPath>* candidate : {&two_steps, &fused}) {
      float ms = 0.0f;
      const LaunchStatus status = TimeLaunches(
          [&] { return Launch(params, stream, candidate->way); }, repetitions, stream, &ms);
      if (status.is_fault()) return status;
      if (status.ok()) candidate->ms.push_back(ms);
    }
  }
  // A candidate that could not run has lost.
  const auto median = [](const Candidate<KernelPath>& candidate) {
    return candidate.ms.empty() ? std::numeric_limits<float>::max() : MedianMs(candidate.ms);
  };
  std::erase_if(tunings_, [&](const Tuning& tuning) {
    return tuning.in_features == params.in_features && tuning.intermediate == params.intermediate;
  });
  tunings_.push_back({.num_tokens = params.num_tokens,
                      .in_features = params.in_features,
                      .intermediate = params.intermediate,
                      .fused = median(fused) < median(two_steps)});
  return {};
}

bool GatedLinearLauncher::IsFused(const GatedLinearParams& params) const {
  GpuTraits gpu;
  return std::any_of(tunings_.begin(), tunings_.end(), [&](const Tuning& tuning) {
    return tuning.fused && tuning.in_features == params.in_features &&
           tuning.intermediate == params.intermediate &&
           TuningHolds(tuning.num_tokens, params.num_tokens) && CanFuse(params, &gpu);
  });
}

}  // namespace prefilld::kernels::cuda
