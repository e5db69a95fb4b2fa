// HostCopies by the copy engines of a GPU.
#ifndef PREFILLD_MODEL_DEVICE_CUDA_HOST_COPIES_H_
#define PREFILLD_MODEL_DEVICE_CUDA_HOST_COPIES_H_

#include <cuda_runtime_api.h>

#include <atomic>

#include "absl/status/status.h"
#include "model/device/cuda_status.h"
#include "model/device/host_copies.h"

namespace prefilld::model {

// Loads and saves have a stream each, so that neither waits for the other one or for the KV that
// is packed.
class CudaHostCopies final : public HostCopies {
 public:
  // Both are borrowed. Ops run on `ops`.
  CudaHostCopies(cudaStream_t ops, CudaFault* fault) : ops_(ops), fault_(*fault) {}
  ~CudaHostCopies() override;

  // Creates the streams. Must be called before any copy.
  absl::Status Initialize();

  absl::Status StartLoads(absl::Span<const RowCopy> copies) override;
  absl::Status OrderOpsBehindLoads() override;
  absl::Status FinishLoads() override;
  absl::Status StartSaves(absl::Span<const RowCopy> copies) override;
  absl::Status FinishSaves() override;
  double load_seconds() const override { return load_seconds_.load(); }

 private:
  absl::Status Start(absl::Span<const RowCopy> copies, cudaMemcpyKind kind, cudaStream_t stream);
  // Adds the time of the latest loads, if they are done.
  void CountLoads();

  const cudaStream_t ops_;
  CudaFault& fault_;
  cudaStream_t loads_ = nullptr;
  cudaStream_t saves_ = nullptr;
  cudaEvent_t ops_queued_ = nullptr;  // recorded on ops_ before loads start
  cudaEvent_t loads_begin_ = nullptr;
  cudaEvent_t loads_end_ = nullptr;
  bool counted_ = true;  // the latest loads are in load_seconds_
  std::atomic<double> load_seconds_{0.0};
};

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_DEVICE_CUDA_HOST_COPIES_H_
