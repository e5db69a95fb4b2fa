// The Hopper estimate.
//
// Arithmetic, at 28 heads of 128 and 128k keys: there are two passes of Q K^T
// (pattern/sm80/estimate.cu says why two), 120 GFLOP each, 0.13 ms of the tensor cores. Every logit
// takes one exponential in either pass: 470 M of them, 0.13 ms of the special-function units at 16
// a cycle and SM. Both must run side by side and hide everything else, about 4 instructions per
// logit and lane. So four consumer warpgroups take turns at the tensor cores, while the others work
// on their logits. K is 134 MB; the heads of a KV head are computed at the same time, so that it is
// read from DRAM once.
//
// A CTA takes a head and a group of 16 key blocks at a time, one block for each consumer warp. It
// goes through the blocks side by side, 16 keys of each in a step: a step's tile has 256 rows, 16
// of every block, so that each warp gets 16 consecutive keys. There are no atomics, so the result
// is the same every time.
#include "kernels/cuda/pattern/sm90/estimate.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/pattern/sm90/masses.cuh"
#include "kernels/cuda/pattern/sm90/row_sums.cuh"
#include "kernels/cuda/pattern/sm90/tiles.cuh"
#include "kernels/cuda/tensor_map.h"

namespace prefilld::kernels::cuda::sm90 {
namespace estimate {
namespace {

// A consumer warpgroup's loop over items and steps. Pass is RowSums or Masses.
template <typename Pass>
__device__ inline void consume(const Launch& launch, typename Pass::Storage& shared) {
  using namespace device;
  using Storage = typename Pass::Storage;
  const auto turn = [](int after) { return kFirstTurn + (Place().consumer + after) % kConsumers; };
  const bool first_lane = threadIdx.x % 32 == 0;
  // Consumer 0 goes first.
  if (threadIdx.x / kWarpgroup == kConsumers - 1) named_barrier_arrive(turn(1), 2 * kWarpgroup);
  Pass pass(launch, shared);
  for (int i = 0; item_number(i) < launch.num_items; ++i) {
    const RingPosition<kQuerySlots> slot(i);
    mbarrier_wait(&shared.q_full[slot.stage], slot.parity);
    pass.begin(Item(launch, item_number(i)));
#pragma unroll 1
    for (int step = 0; step < kSteps; ++step) {
      const RingPosition<Storage::kStages> ring(step);
      float s[64];
      const Operands tiles = Pass::operands(shared.q[slot.stage], shared.k[ring.stage]);
#pragma unroll
      for (int q = 0; q < Pass::kQuarters; ++q) {
        mbarrier_wait(&shared.k_full[ring.stage][pass.first_quarter() + q], ring.parity);
      }
      named_barrier_sync(turn(0), 2 * kWarpgroup);
      wgmma_fence();
      Pass::issue(s, tiles, [&] { named_barrier_arrive(turn(1), 2 * kWarpgroup); });
      wgmma_wait<0>();
      keep_in_order(s);
      if (first_lane) {
#pragma unroll
        for (int q = 0; q < Pass::kQuarters; ++q) {
          mbarrier_arrive(&shared.k_empty[ring.stage][pass.first_quarter() + q]);
        }
      }
      pass.add(s, step, slot.stage);
    }
    __syncwarp();  // all lanes are done with the slot
    if (first_lane) mbarrier_arrive(&shared.q_empty[slot.stage]);
    pass.end(i);
  }
}

template <typename Pass, int kHeadDim>
__global__ void __launch_bounds__(kThreads, 1)
    estimate_kernel(const __grid_constant__ Launch launch,
                    const __grid_constant__ TensorMaps maps) {
  using namespace device;
  using Storage = SharedStorage<kHeadDim>;
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<Storage*>(memory);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kQuerySlots; ++i) {
      mbarrier_init(&shared.q_full[i], 1);
      mbarrier_init(&shared.q_empty[i], kConsumerWarps);
    }
    for (int i = 0; i < Storage::kStages; ++i) {
      for (int quarter = 0; quarter < kConsumers; ++quarter) {
        mbarrier_init(&shared.k_full[i][quarter], 1);
        // Every warp that reads the quarter arrives.
        mbarrier_init(&shared.k_empty[i][quarter], Pass::kQuarters * kConsumerWarps / kConsumers);
      }
    }
    for (int i = 0; i < kConsumerWarps; ++i) mbarrier_init(&shared.diagonals_full[i], 32);
    fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x < kConsumers * kWarpgroup) {
    register_increase<kConsumerRegisters>();
    consume<Pass>(launch, shared);
  } else {
    register_decrease<kProducerRegisters>();
    if (threadIdx.x % 32 == 0) {
      produce<kHeadDim, Pass::kMass>(launch, shared, maps,
                                     static_cast<int>(threadIdx.x / 32 - kConsumerWarps));
    }
  }
}

constexpr int kMergeRows = 32;
constexpr int kMergeParts = 16;

// Merges the maxima and sums of all chunks. grid: (runs of kMergeRows rows, heads); a thread merges
// every kMergeParts-th chunk of a row.
__global__ void __launch_bounds__(kMergeParts* kMergeRows)
    merge_row_sums_kernel(const __grid_constant__ Launch launch) {
  __shared__ float2 parts[kMergeParts][kMergeRows];
  const int run_row = static_cast<int>(threadIdx.x) % kMergeRows;
  const int part = static_cast<int>(threadIdx.x) / kMergeRows;
  const int row = static_cast<int>(blockIdx.x) * kMergeRows + run_row;
  const int64_t head = blockIdx.y;
  const int num_chunks = 2 * launch.num_groups;
  const float2* row_sums = launch.row_sums + head * num_chunks * kBlock + row;
  const auto merge = [](float2& a, float2 b) {
    const float max = fmaxf(a.x, b.x);
    if (max == -INFINITY) return;
    a.y = a.y * device::exp2_approx(a.x - max) + b.y * device::exp2_approx(b.x - max);
    a.x = max;
  };
  float2 sum = make_float2(-INFINITY, 0.0f);
#pragma unroll 8
  for (int chunk = part; chunk < num_chunks; chunk += kMergeParts) {
    merge(sum, row_sums[static_cast<int64_t>(chunk) * kBlock]);
  }
  parts[part][run_row] = sum;
  __syncthreads();
  if (part != 0) return;
#pragma unroll
  for (int i = 1; i < kMergeParts; ++i) merge(sum, parts[i][run_row]);
  // The number of queries makes each row's mass its share of the mean. Rows that hold no query get
  // no mass.
  const float num_queries = static_cast<float>(launch.op.num_queries);
  launch.row_lse[head * kBlock + row] =
      row < launch.op.num_queries ? sum.x + device::log2_approx(sum.y * num_queries) : INFINITY;
}

// Adds to each group's slash mass that of the diagonals that reach into it from the group before.
// grid: (groups but the first, heads).
__global__ void __launch_bounds__(kBlock)
    add_overhangs_kernel(const __grid_constant__ Launch launch) {
  const int64_t head = blockIdx.y;
  const int64_t group = blockIdx.x;
  const int64_t offset = launch.first_position - (group + 1) * kGroupKeys + threadIdx.x;
  if (offset < 0 || offset >= launch.op.num_keys) return;
  launch.op.slash[head * launch.op.num_keys + offset] +=
      launch.overhangs[(head * (launch.num_groups - 1) + group) * kBlock + threadIdx.x];
}

template <typename Pass, int kHeadDim>
cudaError_t LaunchPass(const Launch& launch, const TensorMaps& maps, int num_sms,
                       cudaStream_t stream) {
  constexpr size_t kSharedBytes = sizeof(SharedStorage<kHeadDim>);
  static_assert(kSharedBytes <= kMaxSharedBytesSm90, "the tiles fit into an SM");
  return LaunchKernel(estimate_kernel<Pass, kHeadDim>, std::min(num_sms, launch.num_items),
                      kThreads, kSharedBytes, stream, launch, maps);
}

template <int kHeadDim>
cudaError_t LaunchKernels(const Launch& launch, const TensorMaps& maps, int num_sms,
                          cudaStream_t stream) {
  cudaError_t error = LaunchPass<RowSums<kHeadDim>, kHeadDim>(launch, maps, num_sms, stream);
  if (error != cudaSuccess) return error;
  merge_row_sums_kernel<<<dim3(kBlock / kMergeRows, launch.op.num_heads), kMergeParts * kMergeRows,
                          0, stream>>>(launch);
  error = LaunchPass<Masses<kHeadDim>, kHeadDim>(launch, maps, num_sms, stream);
  if (error != cudaSuccess || launch.num_groups == 1) return error;
  add_overhangs_kernel<<<dim3(launch.num_groups - 1, launch.op.num_heads), kBlock, 0, stream>>>(
      launch);
  return cudaGetLastError();
}

cudaError_t MakeTensorMaps(const EstimateParams& p, TensorMaps* maps) {
  const uint64_t d = p.head_dim;
  const uint64_t heads = p.num_heads;
  const uint64_t keys = p.num_keys;
  const uint64_t kv_heads = p.num_kv_heads;
  const uint64_t kv_head_stride = p.kv_head_stride;
  cudaError_t error = MakeTensorMap({.data = p.q,
                                     .dims = {d, heads, static_cast<uint64_t>(p.num_queries)},
                                     .strides = {d, d * heads},
                                     .box1 = 1,
                                     .box2 = kBlock},
                                    &maps->q);
  if (error != cudaSuccess) return error;
  error = MakeTensorMap({.data = p.k,
                         .dims = {d, keys, kv_heads},
                         .strides = {d, kv_head_stride},
                         .box1 = kStepKeys,
                         .box2 = 1},
                        &maps->k);
  // With fewer keys than a block has there is no whole block to describe, and none is copied.
  if (error != cudaSuccess || keys < kBlock) return error;
  return MakeTensorMap({.data = p.k,
                        .dims = {d, kBlock, keys / kBlock, kv_heads},
                        .strides = {d, kBlock * d, kv_head_stride},
                        .box1 = kStepKeys,
                        .box2 = kQuarterBlocks},
                       &maps->k_blocks);
}

}  // namespace
}  // namespace estimate

bool Supports(const EstimateParams& p) {
  using namespace estimate;
  // Positions are ints, also those of a group that ends past the last key.
  return (p.head_dim == 64 || p.head_dim == 128) && p.block_tokens == kBlock &&
         p.kv_head_stride % 8 == 0 &&
         p.num_keys <= std::numeric_limits<int32_t>::max() - 2 * kGroupKeys;
}

cudaError_t LaunchEstimate(const EstimateParams& p, int num_sms, cudaStream_t stream) {
  using namespace estimate;
  Launch launch{};
  launch.op = p;
  launch.scale_log2 = p.scale * static_cast<float>(M_LOG2E);
  launch.num_groups = NumEstimateGroups(p.num_queries, p.num_keys);
  launch.num_items = launch.num_groups * p.num_heads;
  launch.num_key_blocks = static_cast<int>(CeilDiv(p.num_keys, kBlock));
  launch.first_position = static_cast<int>(p.num_keys - p.num_queries);
  const EstimateScratch scratch = LayOutEstimateScratch(launch.num_groups, p.num_heads);
  float* floats = static_cast<float*>(p.scratch);
  launch.row_sums = reinterpret_cast<float2*>(floats + scratch.row_sums);
  launch.row_lse = floats + scratch.row_lse;
  launch.overhangs = floats + scratch.overhangs;

  TensorMaps maps{};
  if (cudaError_t error = MakeTensorMaps(p, &maps); error != cudaSuccess) return error;
  return p.head_dim == 128 ? LaunchKernels<128>(launch, maps, num_sms, stream)
                           : LaunchKernels<64>(launch, maps, num_sms, stream);
}

}  // namespace prefilld::kernels::cuda::sm90
