// Walking round a ring of stages in shared memory (sm_90).
#ifndef PREFILLD_KERNELS_CUDA_DEVICE_RING_CUH_
#define PREFILLD_KERNELS_CUDA_DEVICE_RING_CUH_

#include <cstdint>

namespace prefilld::kernels::cuda::device {

// Which stage of a ring comes next, and the parity its barriers have then.
template <int kStages>
struct RingPosition {
  int stage = 0;
  uint32_t parity = 0;
  __device__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

}  // namespace prefilld::kernels::cuda::device

#endif  // PREFILLD_KERNELS_CUDA_DEVICE_RING_CUH_
