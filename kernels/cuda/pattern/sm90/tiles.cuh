// What both passes of the Hopper estimate share: how the work is divided, shared memory, the
// copying threads, and products of tiles.
#ifndef PREFILLD_KERNELS_CUDA_PATTERN_SM90_TILES_CUH_
#define PREFILLD_KERNELS_CUDA_PATTERN_SM90_TILES_CUH_

#include <cuda.h>
#include <cuda_bf16.h>

#include <cstdint>

#include "kernels/attention.h"
#include "kernels/cuda/device/arithmetic.cuh"
#include "kernels/cuda/device/mbarrier.cuh"
#include "kernels/cuda/device/tma.cuh"
#include "kernels/cuda/device/wgmma.cuh"
#include "kernels/cuda/pattern/estimate_plan.h"
#include "kernels/pattern.h"

namespace prefilld::kernels::cuda::sm90::estimate {

constexpr int kBlock = kEstimateBlock;
constexpr int kChunk = 64;  // head_dim elements per 128-byte swizzled row
constexpr int kWarpgroup = 128;
constexpr int kConsumers = 4;
constexpr int kConsumerWarps = kConsumers * kWarpgroup / 32;
constexpr int kThreads = (kConsumers + 1) * kWarpgroup;  // the last one's warps copy
// Of the 96 that a thread of so many has.
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

// Consumer w may issue its matrix instructions: kFirstTurn + w.
constexpr int kFirstTurn = 1;

struct Launch {
  EstimateParams op;
  float scale_log2;
  int num_groups;
  int num_items;
  int num_key_blocks;
  int first_position;  // of the queries
  float2* row_sums;    // [heads, 2 * num_groups, kBlock]: maximum (log2 scale) and sum
  float* row_lse;      // [heads, kBlock]: log2 of (the whole row's sum * num_queries)
  float* overhangs;    // [heads, num_groups - 1, kBlock]: lower diagonals of the last block
};

struct TensorMaps {
  CUtensorMap q;
  // K by blocks, of which it holds the whole ones; and by keys.
  CUtensorMap k_blocks;
  CUtensorMap k;
};

// Items are taken in this order, so that the heads of a KV head are under way together.
struct Item {
  __device__ Item(const Launch& launch, int number)
      : head(number % launch.op.num_heads), group(number / launch.op.num_heads) {}
  int head;
  int group;
};

// The i-th item of this CTA.
__device__ inline int item_number(int i) {
  return static_cast<int>(blockIdx.x) + i * static_cast<int>(gridDim.x);
}

// Where use number `use` of a ring of kLength places is, and the parity its barriers have then.
template <int kLength>
struct RingPosition {
  __device__ explicit RingPosition(int use) : place(use % kLength), parity(use / kLength % 2) {}
  int place;
  uint32_t parity;
};

template <int kHeadDim>
struct SharedStorage {
  static constexpr int kStages = kHeadDim == 128 ? 2 : 4;
  static_assert(kSteps % (2 * kStages) == 0, "a step has the same place and parity in every item");
  static constexpr int kChunks = kHeadDim / kChunk;

  // [head_dim / 64][rows][64], 128-byte swizzle.
  alignas(1024) __nv_bfloat16 q[kQuerySlots][kBlock * kHeadDim];
  alignas(1024) __nv_bfloat16 k[kStages][kTileRows * kHeadDim];
  alignas(16) float lse[kQuerySlots][kBlock];
  // Of every warp's block: mass at query - key = i - kBlock, both counted from the first.
  float diagonals[kConsumerWarps][2 * kBlock];
  uint64_t q_full[kQuerySlots], q_empty[kQuerySlots];
  // A tile comes and goes in quarters, 64 rows each.
  uint64_t k_full[kStages][kConsumers], k_empty[kStages][kConsumers];
  uint64_t diagonals_full[kConsumerWarps];
};

// Keys 16 step .. of the blocks of a quarter of the tile, and of all chunks of head_dim.
//
// One instruction copies the keys of all four blocks: the consumers leave few issue slots. The map
// by blocks holds whole blocks only; a group with a partial last block is copied by keys, and TMA
// fills in zeros beyond the last one.
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

// A copying thread: there is one for each quarter of the tile, in warps of their own. That of the
// first also copies the queries.
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
    // A group that the keys end in has a block that they end in, unless blocks divide them.
    const bool whole_blocks = launch.op.num_keys % kBlock == 0 ||
                              int64_t{item.group + 1} * kGroupKeys <= launch.op.num_keys;
    if (quarter == 0) {
      mbarrier_wait(&shared.q_empty[slot.place], slot.parity ^ 1);
      uint64_t* full = &shared.q_full[slot.place];
      mbarrier_arrive_expect(full, kQueryBytes);
#pragma unroll
      for (int c = 0; c < Storage::kChunks; ++c) {
        tma_load_3d(shared.q[slot.place] + c * kBlock * kChunk, &maps.q, full, c * kChunk,
                    item.head, 0);
      }
      if constexpr (kMass) {
        bulk_load(shared.lse[slot.place], launch.row_lse + item.head * kBlock,
                  sizeof(shared.lse[0]), full);
      }
    }
#pragma unroll 1
    for (int step = 0; step < kSteps; ++step) {
      const RingPosition<Storage::kStages> ring(step);
      uint64_t* full = &shared.k_full[ring.place][quarter];
      mbarrier_wait(&shared.k_empty[ring.place][quarter], ring.parity ^ 1);
      mbarrier_arrive_expect(full, kQuarterBytes);
      copy_quarter<kHeadDim>(maps, item, kv_head, step, quarter, whole_blocks, shared.k[ring.place],
                             full);
    }
  }
}

// The compiler does not know that matrix instructions finish late: what they write must not be
// touched before the wait that precedes this call.
__device__ inline void keep_in_order(float (&x)[64]) {
#pragma unroll
  for (int i = 0; i < 64; ++i) asm volatile("" : "+f"(x[i])::"memory");
}

// Where the tiles of a product start, as its instructions' descriptors say it. Made before a
// warpgroup's turn at the tensor cores: they stand still for every instruction that the turn begins
// with.
struct Operands {
  __device__ Operands(const __nv_bfloat16* a_tile, const __nv_bfloat16* b_tile)
      : a(device::uniform(static_cast<uint32_t>(device::swizzled_tile_descriptor(a_tile, 0)))),
        b(device::uniform(static_cast<uint32_t>(device::swizzled_tile_descriptor(b_tile, 0)))) {}
  uint32_t a;  // the lower words: the upper ones are alike
  uint32_t b;
};

// s = A B^T of 64 rows of one tile and 128 of another, which have kRowsA and kRowsB in all. Calls
// pass_turn halfway: the next warpgroup starts while the tensor cores still have something to do.
template <int kHeadDim, int kRowsA, int kRowsB, typename PassTurn>
__device__ inline void issue_product(float (&s)[64], const Operands& tiles,
                                     const PassTurn& pass_turn) {
  using namespace device;
  constexpr uint32_t kUnit = 16;  // bytes that descriptors count in
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

// Where a consumer thread's logits lie: element 4 j + 2 h + e of a product is row 8 h + row of its
// warp's 16, column 8 j + column + e. Made anew where it is used, not kept: the second pass has no
// registers to spare.
struct Place {
  __device__ Place() {
    const unsigned thread = threadIdx.x;
    warp = static_cast<int>(thread / 32);
    consumer = static_cast<int>(thread / kWarpgroup);
    row = static_cast<int>(thread % 32 / 4);
    quad_lane = static_cast<int>(thread % 4);
    column = 2 * quad_lane;
  }
  int warp;  // of all consumers'
  int consumer;
  int row;
  int quad_lane;
  int column;
};

// Keys up to which query i sees, less i, from `first_key` on.
__device__ inline int visible_keys(const Launch& launch, int first_key) {
  return launch.first_position - first_key;
}

}  // namespace prefilld::kernels::cuda::sm90::estimate

#endif  // PREFILLD_KERNELS_CUDA_PATTERN_SM90_TILES_CUH_
