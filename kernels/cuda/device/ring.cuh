// Walking round a ring of stages in shared memory (sm_90).
#ifndef PREFILLD_KERNELS_CUDA_DEVICE_RING_CUH_
#define PREFILLD_KERNELS_CUDA_DEVICE_RING_CUH_

#include <cstdint>

namespace prefilld::kernels::cuda::device {

// A use of a ring of stages: the stage that is used, and the parity that its barriers have then.
// Uses are counted from 0, and use n is of stage n % kStages.
template <int kStages>
struct RingPosition {
  __device__ RingPosition() {}
  __device__ explicit RingPosition(int use) : stage(use % kStages), parity(use / kStages % 2) {}
  // Goes on to the next use.
  __device__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }

  int stage = 0;
  uint32_t parity = 0;
};

}  // namespace prefilld::kernels::cuda::device

#endif  // PREFILLD_KERNELS_CUDA_DEVICE_RING_CUH_
