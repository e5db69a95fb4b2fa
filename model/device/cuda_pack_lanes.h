// Packs KV from device memory into pinned host memory, beside the compute stream.
#ifndef PREFILLD_MODEL_DEVICE_CUDA_PACK_LANES_H_
#define PREFILLD_MODEL_DEVICE_CUDA_PACK_LANES_H_

#include <cuda_runtime_api.h>

#include <array>
#include <cstddef>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "kernels/kv_pack.h"

namespace prefilld::model {

// A few streams with pinned memory to convert from. Packing takes no SM (kernels/cuda/kv_pack.h
// says why): copy engines bring the bytes, and the calling thread converts them if they are not
// wanted in bf16. Thread-safe: a caller takes a free lane or waits for one.
class CudaPackLanes {
 public:
  // Two lanes keep the copy engine busy while other threads checksum and send. With four, two of
  // them may convert meanwhile.
  static constexpr int kLanes = 4;
  // The bf16 of a frame of 2 MiB in fp8. A lane grows, and stays so, if a frame needs more: at most
  // to twice the largest frame.
  static constexpr size_t kSourceBytes = size_t{4} << 20;

  CudaPackLanes() = default;
  CudaPackLanes(const CudaPackLanes&) = delete;
  CudaPackLanes& operator=(const CudaPackLanes&) = delete;
  ~CudaPackLanes();

  // Allocates kSourceBytes of pinned memory for each lane. Must be called before the first Pack, by
  // the thread whose current device is the one that packs.
  cudaError_t Reserve();

  // Packs into params.dst in pinned host memory. Returns when the bytes are there.
  cudaError_t Pack(const kernels::PackKvParams& params);

 private:
  struct Lane {
    cudaStream_t stream = nullptr;
    void* source = nullptr;
    size_t bytes = 0;
    bool busy = false;
  };

  Lane* Acquire();
  void Release(Lane* lane);
  static cudaError_t Grow(size_t bytes, Lane* lane);
  static cudaError_t PackOnLane(const kernels::PackKvParams& params, Lane* lane);
  static cudaError_t ConvertOnLane(const kernels::PackKvParams& params, Lane* lane);

  absl::Mutex mu_;
  std::array<Lane, kLanes> lanes_;  // mu_ guards `busy`; the thread that set it owns the rest
};

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_DEVICE_CUDA_PACK_LANES_H_
