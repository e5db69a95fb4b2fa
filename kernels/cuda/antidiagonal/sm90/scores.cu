// The Hopper antidiagonal scores.
//
// Arithmetic, at 28 heads of 128, 128k tokens and stride 8: 16,384 folds of 1024 numbers, 7.8 TFLOP
// with the tiles on the diagonal, 12 ms at the 650 TFLOP/s that the card's power allows. Scores in
// memory would be 7.5 GB in bf16; here they never leave the registers.
//
// Nothing is folded in memory. The product of two folds is a sum over the positions t of a fold and
// over head_dim: a step of 64 numbers takes position stride - 1 - t of the query folds and position
// t of the key folds, tokens that lie `stride` apart, which the copy engine gathers. Each position
// has its own description for it, which begins at the first token of that position and ends with
// the last, so that everything that the call does not have arrives as zero.
//
// Two CTAs form a cluster and take 256 query folds of one head, 128 each. They walk over the key
// folds in tiles of 256, from the first on; so both see the same tiles, and only the last has to be
// masked. A step is 4.2 MFLOP a CTA, 1024 cycles of an SM's tensor cores, and needs 48 KiB. L2
// gives an SM some 32 bytes a cycle, too little. So each CTA loads half of the keys for both, which
// makes 32 KiB a step.
//
// After 16 steps (stride 8, head_dim 128: 16 thousand cycles) each of the two consumers has 64 x
// 256 scores. Their exponentials take 1024 cycles of the special-function unit; a thread adds up
// its columns of a block, and a quad exchanges the sums so that each lane writes those of every
// fourth block to scratch memory. When the row is done they become block mass
// (antidiagonal/mass.cuh). One consumer's scores may be worked on while the other uses the tensor
// cores, as far as the ring of stages lets it run ahead.
#include "kernels/cuda/antidiagonal/sm90/scores.h"

#include <cuda.h>
#include <cuda_bf16.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "kernels/cuda/antidiagonal/mass.cuh"
#include "kernels/cuda/device/accumulator.cuh"
#include "kernels/cuda/device/arithmetic.cuh"
#include "kernels/cuda/device/cluster.cuh"
#include "kernels/cuda/device/cluster_product.cuh"
#include "kernels/cuda/device/mbarrier.cuh"
#include "kernels/cuda/device/ring.cuh"
#include "kernels/cuda/device/tma.cuh"
#include "kernels/cuda/device/wgmma.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/tensor_map.h"

namespace prefilld::kernels::cuda::sm90 {
namespace antidiagonal {
namespace {

constexpr int kClusterCtas = 2;
constexpr int kRows = 128;  // query folds of a CTA
constexpr int kTileFolds = kClusterCtas * kRows;
constexpr int kHalfColumns = kTileFolds / kClusterCtas;  // key folds that a CTA loads
constexpr int kStep = 64;  // elements of head_dim, which make a 128-byte swizzled row
constexpr int kStages = 4;
constexpr int kMaxStride = 16;
constexpr int kWarpgroup = 128;  // threads
constexpr int kConsumers = 2;    // warpgroups
constexpr int kConsumerWarps = kConsumers * kWarpgroup / 32;
constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
// A thread starts with 168 of an SM's 64k registers. The copying thread has five loops to keep, the
// consumers hold 128 accumulators a thread.
constexpr int kProducerRegisters = 40;
constexpr int kConsumerRegisters = 232;
static_assert(kRows == kConsumers * kGroupFolds && kTileFolds == 256,
              "a consumer's wgmma is 64 by 256");
static_assert(kConsumers == kGroupsPerSm && kTileFolds == kMaxFoldRun,
              "scratch memory has room for the weights of a CTA");

// The four warps of a consumer wait for each other at its barrier.
enum NamedBarrier : int { kConsumer0 = 1, kConsumer1 = 2 };

// The descriptions of Q and K for each position of a fold. Row `fold - first` of one is the token
// of that fold.
struct TensorMaps {
  CUtensorMap q[kMaxStride];  // boxes of [kRows, 1, kStep]
  CUtensorMap k[kMaxStride];  // boxes of [1, kHalfColumns, kStep]
};

struct Launch {
  FoldLaunch folds;
  int first_q[kMaxStride];  // the fold of row 0 of maps.q
  int first_k[kMaxStride];  // the fold of row 0 of maps.k
  int chunks;               // steps for one position of a fold: head_dim / kStep
};

// Tiles of 128-byte rows, swizzled (device/wgmma.cuh).
struct SharedStorage {
  alignas(1024) __nv_bfloat16 q[kStages][kRows * kStep];
  alignas(1024) __nv_bfloat16 k[kStages][kTileFolds * kStep];
  alignas(16) float log_sums[kRows];
  // A stage of this CTA is full when its three boxes have come; the peer sends one of them. It is
  // empty when the consumers of both CTAs have read the stage, so that this CTA may send to both
  // again.
  uint64_t full[kStages];
  uint64_t empty[kStages];
};
constexpr uint32_t kStageBytes = sizeof(SharedStorage::q[0]) + sizeof(SharedStorage::k[0]);

// Calls visit(tile, place of the head) for each tile of query folds of this cluster. Both of its
// CTAs get the same calls.
template <typename Visit>
__device__ inline void for_each_item(const Launch& launch, Visit visit) {
  const FoldLaunch& folds = launch.folds;
  const int num_clusters = static_cast<int>(gridDim.x) / kClusterCtas;
  const int cluster = static_cast<int>(blockIdx.x) / kClusterCtas;
  const int last_tile = folds.first_tile + folds.num_items / folds.num_scored - 1;
#pragma unroll 1
  for (int turn = 0; turn * num_clusters < folds.num_items; ++turn) {
    const int item = ItemOfTurn(turn, cluster, num_clusters);
    if (item >= folds.num_items) continue;
    visit(last_tile - item / folds.num_scored, item % folds.num_scored);
  }
}

// The copying thread's loop.
__device__ inline void produce(const Launch& launch, SharedStorage& shared,
                               const TensorMaps& maps) {
  using namespace device;
  constexpr uint16_t kBothCtas = (1 << kClusterCtas) - 1;
  const int rank = cluster_rank();
  const int stride = launch.folds.stride;
  device::RingPosition<kStages> ring;
  for_each_item(launch, [&](int tile, int place) {
    const int head = launch.folds.heads[place];
    const int kv_head = head / launch.folds.heads_per_kv_head;
    const int query_fold = tile * kTileFolds + rank * kRows;
#pragma unroll 1
    for (int column = 0; column <= tile; ++column) {
      const int key_fold = column * kTileFolds + rank * kHalfColumns;
#pragma unroll 1
      for (int t = 0; t < stride; ++t) {
        const int u = stride - 1 - t;  // the position of the queries
        const int q_row = query_fold - launch.first_q[u];
        const int k_row = key_fold - launch.first_k[t];
#pragma unroll 1
        for (int chunk = 0; chunk < launch.chunks; ++chunk) {
          uint64_t* full = &shared.full[ring.stage];
          mbarrier_wait(&shared.empty[ring.stage], ring.parity ^ 1);
          // The peer's box may have come already; the phase does not end without this arrival.
          mbarrier_arrive_expect(full, kStageBytes);
          tma_load_3d(shared.q[ring.stage], &maps.q[u], full, chunk * kStep, head, q_row);
          tma_load_3d_multicast(shared.k[ring.stage] + rank * kHalfColumns * kStep, &maps.k[t],
                                full, kBothCtas, chunk * kStep, k_row, kv_head);
          ring.advance();
        }
      }
    }
  });
}

// One consumer warpgroup. It computes 64 query folds of every tile.
template <int kPerBlock>
class Consumer {
 public:
  __device__ Consumer(const Launch& launch, SharedStorage& shared)
      : launch_(launch),
        shared_(shared),
        index_(static_cast<int>(device::uniform(threadIdx.x / kWarpgroup)) - 1),
        thread_(static_cast<int>(threadIdx.x) % kWarpgroup),
        weights_(launch.folds.weights + (static_cast<int64_t>(blockIdx.x) * kConsumers + index_) *
                                            launch.folds.weight_blocks * kGroupFolds),
        product_(shared.full, shared.empty, thread_) {}

  __device__ void run() {
    const int rank = device::cluster_rank();
    for_each_item(launch_, [&](int tile, int place) {
      const int first_fold = tile * kTileFolds + rank * kRows + index_ * kGroupFolds;
      max_[0] = max_[1] = -INFINITY;
      sum_[0] = sum_[1] = 0.0f;
#pragma unroll 1
      for (int column = 0; column <= tile; ++column) {
        float d[128];
        multiply(d);
        if (column == tile) mask(d, first_fold, column * kTileFolds);
        absorb(d);
        record(d, column);
      }
      finish(first_fold, place);
    });
  }

 private:
  static constexpr int kTileBlocks = kTileFolds / kPerBlock;
  static_assert(kPerBlock == 8 || kPerBlock == 16, "a block is whole runs of eight columns");

  // The row of the consumer's 64 that this thread's first accumulators belong to.
  __device__ int own_row() const { return thread_ / 32 * 16 + device::accumulator_row(thread_); }

  // Computes d = the scores of this consumer's query folds on a tile of key folds.
  __device__ void multiply(float (&d)[128]) {
    using namespace device;
    product_.template multiply<sizeof(shared_.q[0]) / 16, sizeof(shared_.k[0]) / 16>(
        d, swizzled_tile_descriptor(shared_.q[0] + index_ * kGroupFolds * kStep, 0),
        swizzled_tile_descriptor(shared_.k[0], 0), launch_.folds.stride * launch_.chunks);
  }

  // Hides the key folds that a query fold does not see.
  __device__ void mask(float (&d)[128], int first_fold, int key_fold) const {
    using namespace device;
    const int row = first_fold + own_row();
    const int column = key_fold + accumulator_column(thread_);
    const int visible[2] = {VisibleFolds(launch_.folds, row) - column,
                            VisibleFolds(launch_.folds, row + 8) - column};
#pragma unroll
    for (int i = 0; i < 128; ++i) {
      if (element_column(i) >= visible[i / 2 % 2]) d[i] = -INFINITY;
    }
  }

  // Takes in the scores of a tile and turns them into exp2(score * scale_log2 - maximum).
  __device__ void absorb(float (&d)[128]) {
    using namespace device;
    const float scale_log2 = launch_.folds.scale_log2;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float m = fmaxf(d[2 * h], d[2 * h + 1]);
#pragma unroll
      for (int j = 1; j < 32; ++j) m = fmaxf(m, fmaxf(d[4 * j + 2 * h], d[4 * j + 2 * h + 1]));
      const float new_max = fmaxf(max_[h], quad_max(m) * scale_log2);
      const float rescale = exp2_approx(max_[h] - new_max);
      max_[h] = new_max;
      float total = 0.0f;
#pragma unroll
      for (int j = 0; j < 32; ++j) {
        float& a = d[4 * j + 2 * h];
        float& b = d[4 * j + 2 * h + 1];
        a = exp2_approx(fmaf(a, scale_log2, -new_max));
        b = exp2_approx(fmaf(b, scale_log2, -new_max));
        total += a + b;
      }
      sum_[h] = fmaf(sum_[h], rescale, total);
    }
  }

  // Writes, for each row, log2 of its weight on each of the tile's blocks, from which the final
  // log-sum will be subtracted. Lane q of a quad writes blocks q, 4 + q and so on.
  __device__ void record(const float (&d)[128], int column_tile) const {
    using namespace device;
    float* weights = weights_ +
                     (static_cast<int64_t>(column_tile) * kTileBlocks + thread_ % 4) * kGroupFolds +
                     own_row();
    constexpr int kRuns = kPerBlock / 8;  // of eight columns in a block
#pragma unroll
    for (int first = 0; first < kTileBlocks; first += 4) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float sums[4];
#pragma unroll
        for (int b = 0; b < 4; ++b) {
          const float* run = d + (first + b) * kRuns * 4 + 2 * h;
          sums[b] = run[0] + run[1];
          if constexpr (kRuns == 2) sums[b] += run[4] + run[5];
        }
        const float weight = max_[h] + log2_approx(warp_sums<4, 4>(sums));
        // The weights are read once, at the end of the row, and must not displace queries and keys
        // in L2.
        __stcs(weights + first * kGroupFolds + 8 * h, weight);
      }
    }
  }

  // Turns the weights of the item into block mass.
  __device__ void finish(int first_fold, int place) {
    using namespace device;
    float* log_sums = shared_.log_sums + index_ * kGroupFolds;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float log_sum = max_[h] + log2_approx(quad_sum(sum_[h]));
      const int row = own_row() + 8 * h;
      if (thread_ % 4 == 0) {
        log_sums[row] = has_query(launch_.folds, first_fold + row) ? log_sum : INFINITY;
      }
    }
    // The warps of the consumer see each other's log-sums and weights.
    named_barrier_sync(kConsumer0 + index_, kWarpgroup);
    const FoldLaunch& folds = launch_.folds;
    write_mass<kPerBlock>(folds, weights_, log_sums, first_fold,
                          folds.block_mass + static_cast<int64_t>(place) * folds.num_query_blocks *
                                                 folds.num_key_blocks,
                          thread_);
    // The next item overwrites them.
    named_barrier_sync(kConsumer0 + index_, kWarpgroup);
  }

  const Launch& launch_;
  SharedStorage& shared_;
  const int index_;
  const int thread_;
  float* const weights_;  // [weight_blocks, kGroupFolds]
  // The running maxima, scaled to powers of two, and sums of this thread's two rows. The sums are
  // over this thread's columns only, until reduced.
  float max_[2];
  float sum_[2];
  device::ClusterProduct<kStages, kStep, kClusterCtas> product_;
};

template <int kPerBlock>
__global__ void __cluster_dims__(kClusterCtas, 1, 1) __launch_bounds__(kThreads, 1)
    antidiagonal_scores_kernel(const __grid_constant__ Launch launch,
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
    Consumer<kPerBlock>(launch, shared).run();
  }
  // This CTA has waited for all that was sent to it, but its peer may still arrive at its barriers.
  __syncwarp();
  cluster_sync();
}

// Makes the descriptions of position `u` of the folds. Where the call has no token of it, the map
// is of one token that is never asked for, because rows are counted from 1 then.
cudaError_t MakeMaps(const AntidiagonalScoresParams& p, int u, Launch* launch, TensorMaps* maps) {
  const auto d = static_cast<uint64_t>(p.head_dim);
  const auto heads = static_cast<uint64_t>(p.num_heads);
  const auto stride = static_cast<uint64_t>(p.stride);
  const int64_t first_position = p.num_keys - p.num_queries;
  // The first query whose position is the u-th of a fold.
  const int64_t query = (u - first_position % p.stride + p.stride) % p.stride;
  const bool has_queries = query < p.num_queries;
  launch->first_q[u] = has_queries ? static_cast<int>((first_position + query) / p.stride) : -1;
  const int64_t q_rows = has_queries ? CeilDiv(p.num_queries - query, p.stride) : 1;
  const auto* q = static_cast<const __nv_bfloat16*>(p.q);
  cudaError_t error =
      MakeTensorMap({.data = q + (has_queries ? query : 0) * p.num_heads * p.head_dim,
                     .dims = {d, heads, static_cast<uint64_t>(q_rows)},
                     .strides = {d, stride * heads * d},
                     .box1 = 1,
                     .box2 = kRows},
                    &maps->q[u]);
  if (error != cudaSuccess) return error;
  const bool has_keys = u < p.num_keys;
  launch->first_k[u] = has_keys ? 0 : -1;
  const int64_t k_rows = has_keys ? CeilDiv(p.num_keys - u, p.stride) : 1;
  const auto* k = static_cast<const __nv_bfloat16*>(p.k);
  return MakeTensorMap(
      {.data = k + (has_keys ? u : 0) * p.head_dim,
       .dims = {d, static_cast<uint64_t>(k_rows), static_cast<uint64_t>(p.num_kv_heads)},
       .strides = {stride * d, static_cast<uint64_t>(p.kv_head_stride)},
       .box1 = kHalfColumns,
       .box2 = 1},
      &maps->k[u]);
}

}  // namespace
}  // namespace antidiagonal

bool Supports(const AntidiagonalScoresParams& p) {
  const int per_block = p.block_tokens / p.stride;
  return (per_block == 8 || per_block == 16) && p.stride <= antidiagonal::kMaxStride &&
         p.head_dim % antidiagonal::kStep == 0 && p.kv_head_stride % 8 == 0;
}

cudaError_t LaunchAntidiagonalScores(const AntidiagonalScoresParams& p, FoldLaunch folds,
                                     int num_sms, cudaStream_t stream) {
  using namespace antidiagonal;
  Launch launch{};
  TensorMaps maps{};
  for (int u = 0; u < p.stride; ++u) {
    if (cudaError_t error = MakeMaps(p, u, &launch, &maps); error != cudaSuccess) return error;
  }
  folds.first_tile = folds.first_query_fold / kTileFolds;
  folds.num_items = (static_cast<int>(CeilDiv(folds.num_folds, kTileFolds)) - folds.first_tile) *
                    folds.num_scored;
  launch.folds = folds;
  launch.chunks = p.head_dim / kStep;
  constexpr size_t kSharedBytes = sizeof(SharedStorage);
  static_assert(kSharedBytes <= kMaxSharedBytesSm90, "the tiles fit into an SM");
  const int grid = std::min(num_sms / kClusterCtas, folds.num_items) * kClusterCtas;
  const auto kernel = p.block_tokens / p.stride == 16 ? antidiagonal_scores_kernel<16>
                                                      : antidiagonal_scores_kernel<8>;
  return LaunchKernel(kernel, grid, kThreads, kSharedBytes, stream, launch, maps);
}

}  // namespace prefilld::kernels::cuda::sm90
