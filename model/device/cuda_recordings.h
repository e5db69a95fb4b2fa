// Work that comes again, kept as CUDA graphs.
#ifndef PREFILLD_MODEL_DEVICE_CUDA_RECORDINGS_H_
#define PREFILLD_MODEL_DEVICE_CUDA_RECORDINGS_H_

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <type_traits>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "model/device/device.h"

namespace prefilld::model {

// Not thread-safe, but where it says so.
class CudaRecordings {
 public:
  // Keys that are known: 16 lengths of a model of 80 layers, alone and as batches, and as many
  // again for layers that met another KV slot. What comes when all are taken is not recorded.
  static constexpr size_t kMaxKeys = 5120;

  bool IsKnown(const Device::RecordingKey& key) const { return graphs_.contains(key); }
  bool full() const { return graphs_.size() >= kMaxKeys; }
  void MakeKnown(const Device::RecordingKey& key) { graphs_.try_emplace(key); }
  // Takes the graph.
  void Keep(const Device::RecordingKey& key, cudaGraphExec_t graph);
  // Null unless the key was given to Keep.
  cudaGraphExec_t Find(const Device::RecordingKey& key) const;
  // Of graphs. Thread-safe.
  int64_t count() const { return count_.load(); }
  // Forgets all keys. None of the graphs may be running.
  void Clear();

  // Has `ops` queue their work on `stream`, as a graph instead. `ops_status` is what they return.
  static cudaError_t Record(cudaStream_t stream, absl::FunctionRef<absl::Status()> ops,
                            absl::Status* ops_status, cudaGraphExec_t* graph);

 private:
  struct Destroy {
    void operator()(cudaGraphExec_t graph) const { cudaGraphExecDestroy(graph); }
  };
  using Graph = std::unique_ptr<std::remove_pointer_t<cudaGraphExec_t>, Destroy>;

  std::map<Device::RecordingKey, Graph> graphs_;  // null: known, not recorded
  std::atomic<int64_t> count_{0};
};

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_DEVICE_CUDA_RECORDINGS_H_
