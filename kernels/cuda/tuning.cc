#include "kernels/cuda/tuning.h"

#include <algorithm>
#include <cstddef>

namespace prefilld::kernels::cuda {
namespace {

constexpr double kTuneFlop = 8e12;
constexpr int kMaxRepetitions = 16;

class Event {
 public:
  Event() { status_ = cudaEventCreate(&event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  ~Event() {
    if (status_ == cudaSuccess) cudaEventDestroy(event_);
  }
  cudaError_t Record(cudaStream_t stream) const {
    return status_ == cudaSuccess ? cudaEventRecord(event_, stream) : status_;
  }
  cudaEvent_t get() const { return event_; }

 private:
  cudaEvent_t event_ = nullptr;
  cudaError_t status_;
};

}  // namespace

int TuneRepetitions(int64_t num_tokens, int64_t in_features, int64_t out_features) {
  const double flop = 2.0 * static_cast<double>(num_tokens) * static_cast<double>(in_features) *
                      static_cast<double>(out_features);
  return static_cast<int>(std::clamp(kTuneFlop / flop, 1.0, double{kMaxRepetitions}));
}

LaunchStatus TimeLaunches(const std::function<LaunchStatus()>& launch, int repetitions,
                          cudaStream_t stream, float* ms) {
  const Event begin;
  const Event end;
  cudaError_t error = begin.Record(stream);
  if (error != cudaSuccess) return error;
  for (int i = 0; i < repetitions; ++i) {
    if (const LaunchStatus status = launch(); !status.ok()) return status;
  }
  error = end.Record(stream);
  if (error == cudaSuccess) error = cudaEventSynchronize(end.get());
  if (error == cudaSuccess) error = cudaEventElapsedTime(ms, begin.get(), end.get());
  return error;
}

float MedianMs(std::vector<float> ms) {
  if (ms.size() > 1) ms.erase(ms.begin());
  const auto middle = ms.begin() + static_cast<ptrdiff_t>(ms.size() / 2);
  std::nth_element(ms.begin(), middle, ms.end());
  return *middle;
}

}  // namespace prefilld::kernels::cuda
