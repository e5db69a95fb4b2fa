// The Hopper kernel that computes gate, up and SwiGLU in one.
//
// Arithmetic, at 8192 tokens, 3584 features and 18944 columns: 2.2 TFLOP, which take 3.3 ms at the
// 670 TFLOP/s that the card's power allows. A separate SwiGLU would read 620 MB and write 310 MB,
// after the product has written those 620 MB: 5 % more time. Here gate and up of a column meet in
// one thread's accumulators, and only the result leaves the SM.
//
// A CTA's tile is 128 tokens by 128 columns. A row of it has 128 gate and 128 up accumulators,
// which are one wgmma of N 256, because the rows of both weights lie one behind the other in shared
// memory. A step of 64 features is 4.2 MFLOP, 1024 cycles of an SM's tensor cores, and needs 48
// KiB. L2 gives an SM some 32 bytes a cycle, too little. So two CTAs with the same weights and
// different tokens form a cluster: each loads half of the weights for both, which makes 32 KiB a
// step.
//
// The two consumers, 64 tokens each, never wait for one another, only for data. One consumer's
// epilogue is 8192 outputs, each of which takes two results of the special-function unit (16 a
// cycle): 1024 cycles of a tile's 57 thousand. Meanwhile the other may use the tensor cores alone,
// as far as the ring of stages lets it run ahead.
#include "kernels/cuda/gated_linear/sm90/fused.h"

#include <cuda.h>
#include <cuda_bf16.h>

#include <algorithm>
#include <cstdint>

#include "kernels/attention.h"
#include "kernels/cuda/device/accumulator.cuh"
#include "kernels/cuda/device/arithmetic.cuh"
#include "kernels/cuda/device/cluster.cuh"
#include "kernels/cuda/device/cluster_product.cuh"
#include "kernels/cuda/device/mbarrier.cuh"
#include "kernels/cuda/device/ring.cuh"
#include "kernels/cuda/device/tma.cuh"
#include "kernels/cuda/device/wgmma.cuh"
#include "kernels/cuda/gated_linear/sm90/tile_order.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/tensor_map.h"

namespace prefilld::kernels::cuda::sm90 {
namespace gated_linear {
namespace {

constexpr int kTileTokens = 128;
constexpr int kTileColumns = 128;  // columns of the output; as many rows of gate and of up
constexpr int kStep = 64;          // features, which make a 128-byte swizzled row
constexpr int kStages = 4;
constexpr int kClusterCtas = 2;
constexpr int kWarpgroup = 128;  // threads
constexpr int kConsumers = 2;    // warpgroups
constexpr int kConsumerTokens = kTileTokens / kConsumers;
constexpr int kConsumerWarps = kConsumers * kWarpgroup / 32;
constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
// An SM has 64k registers. The consumers hold 128 accumulators a thread.
constexpr int kProducerRegisters = 24;
constexpr int kConsumerRegisters = 240;
static_assert(kConsumerTokens == 64 && kTileColumns == 128, "a consumer's wgmma is 64 by 2 * 128");

// The four warps of a consumer wait for each other at its barrier.
enum NamedBarrier : int { kConsumer0 = 1, kConsumer1 = 2 };

struct TensorMaps {
  CUtensorMap x;     // boxes of [kTileTokens, kStep]
  CUtensorMap w[2];  // gate and up: boxes of [kTileColumns, kStep]
  CUtensorMap y;     // boxes of [kConsumerTokens, 64]
};

struct Launch {
  TileGrid grid;
  int num_steps;
};

// Tiles of 128-byte rows, swizzled (device/wgmma.cuh).
struct SharedStorage {
  alignas(1024) __nv_bfloat16 x[kStages][kTileTokens * kStep];
  alignas(1024) __nv_bfloat16 w[kStages][2][kTileColumns * kStep];  // gate, up
  alignas(1024) __nv_bfloat16 y[kConsumers][kTileColumns / 64][kConsumerTokens * 64];
  // A stage of this CTA is full when its three boxes have come; the peer sends one of them. It is
  // empty when the consumers of both CTAs have read the stage, so that this CTA may send to both
  // again.
  uint64_t full[kStages];
  uint64_t empty[kStages];
};
constexpr uint32_t kStageBytes = sizeof(SharedStorage::x[0]) + sizeof(SharedStorage::w[0]);

// Calls visit(first token tile, column tile) for each pair of tiles of this cluster. Both of its
// CTAs get the same calls.
template <typename Visit>
__device__ inline void for_each_pair(const Launch& launch, Visit visit) {
  const int num_tiles = launch.grid.num_pairs * launch.grid.num_columns;
  const int num_clusters = static_cast<int>(gridDim.x) / kClusterCtas;
  for (int i = static_cast<int>(blockIdx.x) / kClusterCtas; i < num_tiles; i += num_clusters) {
    const PairOfTiles tiles = PairNumber(launch.grid, i);
    visit(tiles.pair * kClusterCtas, tiles.column);
  }
}

// The copying thread's loop.
__device__ inline void produce(const Launch& launch, SharedStorage& shared,
                               const TensorMaps& maps) {
  using namespace device;
  constexpr uint16_t kBothCtas = (1 << kClusterCtas) - 1;
  const int rank = cluster_rank();
  // This CTA's half of the weights: rank 0 loads gate, rank 1 up.
  const CUtensorMap* w_map = &maps.w[rank];
  device::RingPosition<kStages> ring;
  for_each_pair(launch, [&](int first_token_tile, int column_tile) {
    const int token = (first_token_tile + rank) * kTileTokens;
    const int column = column_tile * kTileColumns;
#pragma unroll 1
    for (int step = 0; step < launch.num_steps; ++step) {
      uint64_t* full = &shared.full[ring.stage];
      mbarrier_wait(&shared.empty[ring.stage], ring.parity ^ 1);
      // The peer's box may have come already; the phase does not end without this arrival.
      mbarrier_arrive_expect(full, kStageBytes);
      tma_load_3d(shared.x[ring.stage], &maps.x, full, step * kStep, token, 0);
      tma_load_3d_multicast(shared.w[ring.stage][rank], w_map, full, kBothCtas, step * kStep,
                            column, 0);
      ring.advance();
    }
  });
}

// Returns silu(gate) * up.
__device__ inline float swiglu(float gate, float up) {
  using namespace device;
  constexpr float kLog2e = 1.44269504f;
  return gate * reciprocal_approx(1.0f + exp2_approx(-kLog2e * gate)) * up;
}

// One consumer warpgroup. It computes 64 tokens of every tile.
class Consumer {
 public:
  __device__ Consumer(const Launch& launch, SharedStorage& shared, const TensorMaps& maps)
      : launch_(launch),
        shared_(shared),
        maps_(maps),
        index_(static_cast<int>(device::uniform(threadIdx.x / kWarpgroup)) - 1),
        thread_(static_cast<int>(threadIdx.x) % kWarpgroup),
        product_(shared.full, shared.empty, thread_) {}

  __device__ void run() {
    const int rank = device::cluster_rank();
    for_each_pair(launch_, [&](int first_token_tile, int column_tile) {
      float d[128];
      multiply(d);
      store(d, (first_token_tile + rank) * kTileTokens + index_ * kConsumerTokens,
            column_tile * kTileColumns);
    });
    // Shared memory must live until the last store has read it.
    if (thread_ == 0) device::tma_store_wait_read();
  }

 private:
  // Computes d = this consumer's rows of x times gate and up.
  __device__ void multiply(float (&d)[128]) {
    using namespace device;
    product_.multiply<sizeof(shared_.x[0]) / 16, sizeof(shared_.w[0]) / 16>(
        d, swizzled_tile_descriptor(shared_.x[0] + index_ * kConsumerTokens * kStep, 0),
        swizzled_tile_descriptor(shared_.w[0], 0), launch_.num_steps);
  }

  // Applies SwiGLU and sends the tile out. The copy engine drops tokens and columns beyond the
  // last.
  __device__ void store(const float (&d)[128], int token, int column) {
    using namespace device;
    auto& tile = shared_.y[index_];
    if (thread_ == 0) tma_store_wait_read();  // the tile before has left `tile`
    named_barrier_sync(kConsumer0 + index_, kWarpgroup);
#pragma unroll
    for (int j = 0; j < kTileColumns / 16; ++j) {
      uint32_t pairs[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* gate = d + 8 * j + 2 * i;
        const float* up = gate + kTileColumns / 2;
        pairs[i] = pack_bf16(swiglu(gate[0], up[0]), swiglu(gate[1], up[1]));
      }
      store_swizzled(tile[0], kConsumerTokens * 64, thread_, j, pairs);
    }
    fence_async_shared();
    named_barrier_sync(kConsumer0 + index_, kWarpgroup);
    if (thread_ == 0) {
#pragma unroll
      for (int c = 0; c < kTileColumns / 64; ++c) {
        tma_store_3d(&maps_.y, tile[c], column + c * 64, token, 0);
      }
      tma_store_commit();
    }
  }

  const Launch& launch_;
  SharedStorage& shared_;
  const TensorMaps& maps_;
  const int index_;
  const int thread_;
  device::ClusterProduct<kStages, kStep, kClusterCtas> product_;
};

__global__ void __cluster_dims__(kClusterCtas, 1, 1) __launch_bounds__(kThreads, 1)
    gated_linear_kernel(const __grid_constant__ Launch launch,
                        const __grid_constant__ TensorMaps maps) {
  using namespace device;
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<SharedStorage*>(memory);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(&shared.full[i], 1);
      mbarrier_init(&shared.empty[i], kClusterCtas * kConsumerWarps);
    }
    fence_mbarrier_init();
  }
  cluster_sync();  // the peer sends to these barriers
  if (threadIdx.x < kWarpgroup) {
    register_decrease<kProducerRegisters>();
    if (threadIdx.x == 0) produce(launch, shared, maps);
  } else {
    register_increase<kConsumerRegisters>();
    Consumer(launch, shared, maps).run();
  }
  // This CTA has waited for all that was sent to it, but its peer may still arrive at its barriers.
  __syncwarp();
  cluster_sync();
}

// Describes a matrix [rows, columns] in boxes of [box_rows, 64].
TensorTiles Matrix(const void* data, int64_t rows, int64_t columns, uint32_t box_rows) {
  const auto width = static_cast<uint64_t>(columns);
  return {.data = data,
          .dims = {width, static_cast<uint64_t>(rows), 1},
          .strides = {width, width},  // the second is not used
          .box1 = box_rows};
}

cudaError_t MakeMaps(const GatedLinearParams& p, TensorMaps* maps) {
  // Gate and up have a map each, so that columns beyond the last are zero in both.
  const auto* gate = static_cast<const __nv_bfloat16*>(p.w);
  const auto* up = gate + p.intermediate * p.in_features;
  cudaError_t error =
      MakeTensorMap(Matrix(p.x, p.num_tokens, p.in_features, kTileTokens), &maps->x);
  if (error == cudaSuccess) {
    error = MakeTensorMap(Matrix(gate, p.intermediate, p.in_features, kTileColumns), &maps->w[0]);
  }
  if (error == cudaSuccess) {
    error = MakeTensorMap(Matrix(up, p.intermediate, p.in_features, kTileColumns), &maps->w[1]);
  }
  if (error == cudaSuccess) {
    error = MakeTensorMap(Matrix(p.y, p.num_tokens, p.intermediate, kConsumerTokens), &maps->y);
  }
  return error;
}

int64_t NumPairs(const GatedLinearParams& p) {
  return CeilDiv(p.num_tokens, kClusterCtas * kTileTokens);
}
int64_t NumColumns(const GatedLinearParams& p) { return CeilDiv(p.intermediate, kTileColumns); }

}  // namespace
}  // namespace gated_linear

bool Supports(const GatedLinearParams& p) {
  using namespace gated_linear;
  constexpr int64_t kMost = int64_t{1} << 30;  // tile numbers and coordinates are 32 bits wide
  const auto aligned = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  return p.in_features > 0 && p.intermediate > 0 && p.in_features % 8 == 0 &&
         p.intermediate % 8 == 0 && aligned(p.x) && aligned(p.w) && aligned(p.y) &&
         p.num_tokens <= kMost && p.in_features <= kMost && p.intermediate <= kMost &&
         NumPairs(p) * NumColumns(p) <= kMost;
}

cudaError_t LaunchGatedLinear(const GatedLinearParams& p, int num_sms, cudaStream_t stream) {
  using namespace gated_linear;
  if (!Supports(p)) return cudaErrorInvalidValue;
  if (p.num_tokens == 0) return cudaSuccess;
  TensorMaps maps;
  if (cudaError_t error = MakeMaps(p, &maps); error != cudaSuccess) return error;
  Launch launch;
  launch.grid = {static_cast<int>(NumPairs(p)), static_cast<int>(NumColumns(p))};
  launch.num_steps = static_cast<int>(CeilDiv(p.in_features, kStep));
  constexpr size_t kSharedBytes = sizeof(SharedStorage);
  static_assert(kSharedBytes <= kMaxSharedBytesSm90, "the tiles fit into an SM");
  const int num_clusters =
      std::min(num_sms / kClusterCtas, launch.grid.num_pairs * launch.grid.num_columns);
  return LaunchKernel(gated_linear_kernel, num_clusters * kClusterCtas, kThreads, kSharedBytes,
                      stream, launch, maps);
}

}  // namespace prefilld::kernels::cuda::sm90
