#include "model/device/cuda_recordings.h"

namespace prefilld::model {

cudaGraphExec_t CudaRecordings::Find(const Device::RecordingKey& key) const {
  const auto found = graphs_.find(key);
  return found == graphs_.end() ? nullptr : found->second.get();
}

void CudaRecordings::Keep(const Device::RecordingKey& key, cudaGraphExec_t graph) {
  graphs_[key].reset(graph);
  ++count_;
}

void CudaRecordings::Clear() {
  graphs_.clear();
  count_ = 0;
}

// The capture is limited to this thread, because other threads pack KV meanwhile and must not be
// recorded.
cudaError_t CudaRecordings::Record(cudaStream_t stream, absl::FunctionRef<absl::Status()> ops,
                                   absl::Status* ops_status, cudaGraphExec_t* graph) {
  cudaError_t error = cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal);
  if (error != cudaSuccess) return error;
  *ops_status = ops();
  cudaGraph_t recorded = nullptr;
  error = cudaStreamEndCapture(stream, &recorded);
  if (error == cudaSuccess && ops_status->ok()) error = cudaGraphInstantiate(graph, recorded, 0);
  if (recorded != nullptr) cudaGraphDestroy(recorded);
  return error;
}

}  // namespace prefilld::model
