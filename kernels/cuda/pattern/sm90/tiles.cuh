// The common parts of both passes of the Hopper estimate: the division of the work, shared memory,
// the copying threads, and products of tiles.
#ifndef PREFILLD_KERNELS_CUDA_PATTERN_SM90_TILES_CUH_
#define PREFILLD_KERNELS_CUDA_PATTERN_SM90_TILES_CUH_

#include <cuda.h>
#include <cuda_bf16.h>

#include <cstdint>

#include "kernels/attention.h"
#include "kernels/cuda/device/accumulator.cuh"
#include "kernels/cuda/device/arithmetic.cuh"
#include "kernels/cuda/device/mbarrier.cuh"
#include "kernels/cuda/device/ring.cuh"
#include "kernels/cuda/device/tma.cuh"
#include "kernels/cuda/device/wgmma.cuh"
#include "kernels/cuda/pattern/plan.h"
#include "kernels/pattern.h"

namespace prefilld::kernels::cuda::sm90::estimate {

constexpr int kBlock = kEstimateBlock;
constexpr int kChunk = 64;  // head_dim elements per 128-byte swizzled row
constexpr int kWarpgroup = 128;
constexpr int kConsumers = 4;
constexpr int kConsumerWarps = kConsumers * kWarpgroup / 32;
constexpr int kThreads = (kConsumers + 1) * kWarpgroup;  // the last one's warps copy
// So many threads start with 96 registers each.
constexpr int kProducerRegisters = 24;
constexpr int kConsumerRegisters = 112;
constexpr int kStepKeys = 16;
constexpr int kSteps = kBlock / kStepKeys;
constexpr int kTileRows = kConsumerWarps * kStepKeys;
constexpr int kGroupKeys = kEstimateGroupBlocks * kBlock;
constexpr int kQuarterBlocks = kEstimateGroupBlocks / kConsumers;
constexpr int kQuerySlots = 2;  // the next head's queries load early
static_assert(kConsumerWarps == kEstimateGroupBlocks, "each consumer warp has its own block");
static_assert(kConsumers == kWarpgroup / 32, "a warp copies each quarter of the tile");

// Named barrier kFirstTurn + w is where consumer w waits for its turn to issue matrix instructions.
constexpr int kFirstTurn = 1;

struct Launch {
  EstimateParams op;
  float scale_log2;
  int num_groups;
  int num_items;
  int num_key_blocks;
  int first_position;  // the position of query 0
  float2* row_sums;    // [heads, 2 * num_groups, kBlock]: maximum (log2 scale) and sum
  float* row_lse;      // [heads, kBlock]: log2 of (the whole row's sum * num_queries)
  float* overhangs;    // [heads, num_groups - 1, kBlock]: lower diagonals of the last block
};

struct TensorMaps {
  CUtensorMap q;
  CUtensorMap k_blocks;  // K by blocks, with whole blocks only
  CUtensorMap k;         // K by keys
};

// An item of work: one head and one group of key blocks. Consecutive items are those of all heads
// for one group, so that the heads of a KV head are computed at the same time.
struct Item {
  __device__ Item(const Launch& launch, int number)
      : head(number % launch.op.num_heads), group(number / launch.op.num_heads) {}
  int head;
  int group;
};

// The number of this CTA's i-th item.
__device__ inline int item_number(int i) {
  return static_cast<int>(blockIdx.x) + i * static_cast<int>(gridDim.x);
}

template <int kHeadDim>
struct SharedStorage {
  static constexpr int kStages = kHeadDim == 128 ? 2 : 4;
  static_assert(kSteps % (2 * kStages) == 0, "a step has the same stage and parity in every item");
  static constexpr int kChunks = kHeadDim / kChunk;

  // [head_dim / 64][rows][64], 128-byte swizzle.
  alignas(1024) __nv_bfloat16 q[kQuerySlots][kBlock * kHeadDim];
  alignas(1024) __nv_bfloat16 k[kStages][kTileRows * kHeadDim];
  alignas(16) float lse[kQuerySlots][kBlock];
  // The mass on each diagonal of every warp's block: element i is that of query - key = i - kBlock,
  // where the query is counted from query 0 and the key from the first of the block.
  float diagonals[kConsumerWarps][2 * kBlock];
  uint64_t q_full[kQuerySlots], q_empty[kQuerySlots];
  // A tile is filled and emptied in quarters of 64 rows.
  uint64_t k_full[kStages][kConsumers], k_empty[kStages][kConsumers];
  uint64_t diagonals_full[kConsumerWarps];
};

// Copies a quarter of a step's tile: keys [16 step, 16 step + 16) of each of its four blocks.
//
// One instruction copies the keys of all four blocks for 64 elements of head_dim, since the
// consumers leave few issue slots. It uses the map by blocks, which holds whole blocks only. A
// group with a partial last block is copied by keys, and TMA fills in zeros beyond the last one.
template <int kHeadDim>
__device__ inline void copy_quarter(const TensorMaps& maps, const Item& item, int kv_head, int step,
                                    int quarter, bool whole_blocks, __nv_bfloat16* tile,
                                    uint64_t* full) {
  constexpr int kChunks = kHeadDim / kChunk;
  const int first_block = quarter * kQuarterBlocks;
  if (whole_blocks) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      device::tma_load_4d(tile + (c * kTileRows + first_block * kStepKeys) * kChunk, &maps.k_blocks,
                          full, c * kChunk, step * kStepKeys,
                          item.group * kEstimateGroupBlocks + first_block, kv_head);
    }
    return;
  }
#pragma unroll 1
  for (int block = first_block; block < first_block + kQuarterBlocks; ++block) {
    const int key = item.group * kGroupKeys + block * kBlock + step * kStepKeys;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      device::tma_load_3d(tile + (c * kTileRows + block * kStepKeys) * kChunk, &maps.k, full,
                          c * kChunk, key, kv_head);
    }
  }
}

// A copying thread's loop. There is one such thread for each quarter of the tile, in a warp of its
// own. The thread of the first quarter also copies the queries.
template <int kHeadDim, bool kMass>
__device__ inline void produce(const Launch& launch, SharedStorage<kHeadDim>& shared,
                               const TensorMaps& maps, int quarter) {
  using namespace device;
  using Storage = SharedStorage<kHeadDim>;
  constexpr uint32_t kQueryBytes = sizeof(shared.q[0]) + (kMass ? sizeof(shared.lse[0]) : 0);
  constexpr uint32_t kQuarterBytes = sizeof(shared.k[0]) / kConsumers;
  for (int i = 0; item_number(i) < launch.num_items; ++i) {
    const Item item(launch, item_number(i));
    const RingPosition<kQuerySlots> slot(i);
    const int kv_head = item.head / (launch.op.num_heads / launch.op.num_kv_heads);
    // All of the group's keys exist, or the keys end with a whole block.
    const bool whole_blocks = launch.op.num_keys % kBlock == 0 ||
                              int64_t{item.group + 1} * kGroupKeys <= launch.op.num_keys;
    if (quarter == 0) {
      mbarrier_wait(&shared.q_empty[slot.stage], slot.parity ^ 1);
      uint64_t* full = &shared.q_full[slot.stage];
      mbarrier_arrive_expect(full, kQueryBytes);
#pragma unroll
      for (int c = 0; c < Storage::kChunks; ++c) {
        tma_load_3d(shared.q[slot.stage] + c * kBlock * kChunk, &maps.q, full, c * kChunk,
                    item.head, 0);
      }
      if constexpr (kMass) {
        bulk_load(shared.lse[slot.stage], launch.row_lse + item.head * kBlock,
                  sizeof(shared.lse[0]), full);
      }
    }
#pragma unroll 1
    for (int step = 0; step < kSteps; ++step) {
      const RingPosition<Storage::kStages> ring(step);
      uint64_t* full = &shared.k_full[ring.stage][quarter];
      mbarrier_wait(&shared.k_empty[ring.stage][quarter], ring.parity ^ 1);
      mbarrier_arrive_expect(full, kQuarterBytes);
      copy_quarter<kHeadDim>(maps, item, kv_head, step, quarter, whole_blocks, shared.k[ring.stage],
                             full);
    }
  }
}

// The descriptors of a product's tiles. They are made before a warpgroup's turn at the tensor
// cores, which idle during every other instruction that the turn begins with.
struct Operands {
  __device__ Operands(const __nv_bfloat16* a_tile, const __nv_bfloat16* b_tile)
      : a(device::uniform(static_cast<uint32_t>(device::swizzled_tile_descriptor(a_tile, 0)))),
        b(device::uniform(static_cast<uint32_t>(device::swizzled_tile_descriptor(b_tile, 0)))) {}
  uint32_t a;  // the lower words; the upper ones are the same for all tiles
  uint32_t b;
};

// Starts s = A B^T for 64 rows of one tile and 128 rows of another; the tiles have kRowsA and
// kRowsB rows in all. Calls pass_turn halfway, so that the next warpgroup starts while the tensor
// cores still have something to do.
template <int kHeadDim, int kRowsA, int kRowsB, typename PassTurn>
__device__ inline void issue_product(float (&s)[64], const Operands& tiles,
                                     const PassTurn& pass_turn) {
  using namespace device;
  constexpr uint32_t kUnit = 16;  // descriptors count 16 bytes
  constexpr int kInstructions = kHeadDim / 16;
  const uint64_t upper = swizzled_tile_descriptor(nullptr, 0) & ~uint64_t{0xffffffff};
#pragma unroll
  for (int n = 0; n < kInstructions; ++n) {
    const int chunk = n / (kChunk / 16);
    const uint32_t column = n % (kChunk / 16) * 2;
    wgmma_m64n128k16_ss(s, upper | (tiles.a + (chunk * kRowsA * kChunk * 2 / kUnit + column)),
                        upper | (tiles.b + (chunk * kRowsB * kChunk * 2 / kUnit + column)), n > 0);
    if (n + 1 == kInstructions / 2) pass_turn();
  }
  wgmma_commit();
}

// The place of a consumer thread, and of its accumulators (device/accumulator.cuh): element i of a
// product is row `row` + element_row(i) of the warp's 16, column `column` + element_column(i). It
// is made anew wherever it is used, because the second pass has no registers to keep it in.
struct Place {
  __device__ Place() {
    const unsigned thread = threadIdx.x;
    warp = static_cast<int>(thread / 32);
    consumer = static_cast<int>(thread / kWarpgroup);
    row = device::accumulator_row(thread);
    quad_lane = static_cast<int>(thread % 4);
    column = device::accumulator_column(thread);
  }
  int warp;  // counted over all consumers
  int consumer;
  int row;
  int quad_lane;
  int column;
};

// Query i sees the keys up to visible_keys() + i, counted from `first_key`.
__device__ inline int visible_keys(const Launch& launch, int first_key) {
  return launch.first_position - first_key;
}

}  // namespace prefilld::kernels::cuda::sm90::estimate

#endif  // PREFILLD_KERNELS_CUDA_PATTERN_SM90_TILES_CUH_
