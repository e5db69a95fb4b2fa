// KV from device memory to pinned host memory beside the compute stream.
#ifndef PREFILLD_MODEL_DEVICE_CUDA_PACK_LANES_H_
#define PREFILLD_MODEL_DEVICE_CUDA_PACK_LANES_H_

#include <cuda_runtime_api.h>

#include <array>
#include <cstddef>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "kernels/kv_pack.h"

namespace prefilld::model {

// A few streams, and device memory to convert into. KV that is wanted as it is, in bf16, goes by
// the copy engines alone. Thread-safe: a caller takes a free lane or waits.
class CudaPackLanes {
 public:
  // Two keep the copy engine busy; other threads sum up and send meanwhile.
  static constexpr int kLanes = 2;
  // Large enough that packing is a small part of the copy's time. K and V of one block of 64 heads
  // of 128 in fp32 fill it; of a model with more, a block grows it.
  static constexpr size_t kPieceBytes = size_t{8} << 20;
  static constexpr size_t kReservedBytes = kLanes * kPieceBytes;

  CudaPackLanes() = default;
  CudaPackLanes(const CudaPackLanes&) = delete;
  CudaPackLanes& operator=(const CudaPackLanes&) = delete;
  ~CudaPackLanes();

  // Takes the memory that packing needs, kReservedBytes, so that none is asked for on a full device
  // later but for blocks larger than a piece. Before the first Pack, on the device that packs.
  cudaError_t Reserve();

  // Packs into params.dst in pinned host memory; returns when the bytes are there.
  cudaError_t Pack(const kernels::PackKvParams& params);

 private:
  struct Lane {
    cudaStream_t stream = nullptr;
    void* device = nullptr;
    size_t bytes = 0;
    bool busy = false;
  };

  Lane* Acquire();
  void Release(Lane* lane);
  static cudaError_t Grow(size_t bytes, Lane* lane);
  static cudaError_t PackOnLane(const kernels::PackKvParams& params, Lane* lane);
  static cudaError_t ConvertOnLane(const kernels::PackKvParams& params, Lane* lane);

  absl::Mutex mu_;
  std::array<Lane, kLanes> lanes_;  // `busy` is guarded by mu_, the rest belongs to who set it
};

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_DEVICE_CUDA_PACK_LANES_H_
