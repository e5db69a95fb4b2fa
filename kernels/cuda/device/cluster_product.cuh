// The consumer's side of a matrix product whose operands come through a ring of stages, which the
// CTAs of a cluster fill for each other (sm_90).
#ifndef PREFILLD_KERNELS_CUDA_DEVICE_CLUSTER_PRODUCT_CUH_
#define PREFILLD_KERNELS_CUDA_DEVICE_CLUSTER_PRODUCT_CUH_

#include <cstdint>

#include "kernels/cuda/device/accumulator.cuh"
#include "kernels/cuda/device/cluster.cuh"
#include "kernels/cuda/device/mbarrier.cuh"
#include "kernels/cuda/device/ring.cuh"
#include "kernels/cuda/device/wgmma.cuh"

namespace prefilld::kernels::cuda::device {

// A consumer warpgroup, which multiplies 64 rows by 256 columns. It goes round the ring as long as
// it lives, through as many products as it computes. A stage holds kStep elements of the dimension
// that is summed over, and has two barriers in this CTA's shared memory: `full` ends a phase when
// everything that the stage is for has come, `empty` when all warps of all consumers of the cluster
// have read it.
template <int kStages, int kStep, int kClusterCtas>
class ClusterProduct {
 public:
  __device__ ClusterProduct(uint64_t (&full)[kStages], const uint64_t (&empty)[kStages], int thread)
      : full_(full),
        lane_(thread % 32),
        remote_empty_(cluster_shared_address(empty, lane_ % kClusterCtas)) {}

  // Computes d = a * b over the next `num_steps` stages, at least one. `a` and `b` describe the
  // operands in stage 0; in each later stage they lie kAUnits and kBUnits further, in the 16 bytes
  // that descriptors count.
  template <uint32_t kAUnits, uint32_t kBUnits>
  __device__ void multiply(float (&d)[128], uint64_t a, uint64_t b, int num_steps) {
    int previous = 0;
#pragma unroll 1
    for (int step = 0; step < num_steps; ++step) {
      mbarrier_wait(&full_[ring_.stage], ring_.parity);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < kStep / 16; ++i) {
        wgmma_m64n256k16_ss(d, a + ring_.stage * kAUnits + i * 2, b + ring_.stage * kBUnits + i * 2,
                            step + i > 0);
      }
      wgmma_commit();
      // A stage is given back while the next one is multiplied, so that the tensor cores never
      // idle.
      wgmma_wait<1>();
      if (step > 0) release(previous);
      previous = ring_.stage;
      ring_.advance();
    }
    wgmma_wait<0>();
    release(previous);
    keep_in_order(d);
  }

 private:
  // Reports to all CTAs of the cluster that this warp has read the stage, because each of them sent
  // a part of it.
  __device__ void release(int stage) {
    if (lane_ < kClusterCtas) {
      mbarrier_arrive_cluster(remote_empty_ + stage * static_cast<uint32_t>(sizeof(uint64_t)));
    }
  }

  uint64_t* const full_;
  const int lane_;
  const uint32_t remote_empty_;  // the `empty` barriers of the CTA that this lane reports to
  RingPosition<kStages> ring_;
};

}  // namespace prefilld::kernels::cuda::device

#endif  // PREFILLD_KERNELS_CUDA_DEVICE_CLUSTER_PRODUCT_CUH_
