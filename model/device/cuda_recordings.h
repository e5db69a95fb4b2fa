// Keeps work that is repeated as CUDA graphs.
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

// The recordings by key. Not thread-safe, except for count().
class CudaRecordings {
 public:
  // The number of keys that are remembered: 16 lengths of a model of 80 layers, alone and as
  // batches, and as many again for layers that met another KV slot. Work of further keys is not
  // recorded.
  static constexpr size_t kMaxKeys = 5120;

  bool IsKnown(const Device::RecordingKey& key) const { return graphs_.contains(key); }
  bool full() const { return graphs_.size() >= kMaxKeys; }
  void MakeKnown(const Device::RecordingKey& key) { graphs_.try_emplace(key); }
  // Stores the graph of a key and takes ownership of it.
  void Keep(const Device::RecordingKey& key, cudaGraphExec_t graph);
  // Returns null unless the key was given to Keep.
  cudaGraphExec_t Find(const Device::RecordingKey& key) const;
  // Counts the graphs. Thread-safe.
  int64_t count() const { return count_.load(); }
  // Forgets all keys. No graph may be running.
  void Clear();

  // Captures the work that `ops` queue on `stream` as a graph, without running it. `ops_status`
  // gets what `ops` return.
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
