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

// A few streams with device memory to convert into. KV that is wanted as it is, in bf16, needs only
// the copy engines. Thread-safe: a caller takes a free lane or waits for one.
class CudaPackLanes {
 public:
  // Two lanes keep the copy engine busy while other threads checksum and send.
  static constexpr int kLanes = 2;
  // The size makes the packing kernel's time small beside the copy's. K and V of one block of 64
  // heads of 128 in fp32 fill it. A lane grows if a block of a larger model needs more.
  static constexpr size_t kPieceBytes = size_t{8} << 20;
  static constexpr size_t kReservedBytes = kLanes * kPieceBytes;

  CudaPackLanes() = default;
  CudaPackLanes(const CudaPackLanes&) = delete;
  CudaPackLanes& operator=(const CudaPackLanes&) = delete;
  ~CudaPackLanes();

  // Allocates kReservedBytes of device memory, so that later, when the device may be full, only
  // blocks larger than a piece need more. Must be called before the first Pack, by the thread whose
  // current device is the one that packs.
  cudaError_t Reserve();

  // Packs into params.dst in pinned host memory. Returns when the bytes are there.
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
  std::array<Lane, kLanes> lanes_;  // mu_ guards `busy`; the thread that set it owns the rest
};

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_DEVICE_CUDA_PACK_LANES_H_
