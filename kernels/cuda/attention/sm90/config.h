// Tile sizes, shared memory and barriers of the Hopper attention kernel.
#ifndef PREFILLD_KERNELS_CUDA_ATTENTION_SM90_CONFIG_H_
#define PREFILLD_KERNELS_CUDA_ATTENTION_SM90_CONFIG_H_

#include <cuda.h>
#include <cuda_bf16.h>

#include <cstdint>

#include "kernels/attention.h"
#include "kernels/cuda/attention/plan.h"

namespace prefilld::kernels::cuda::sm90 {

inline constexpr int kTile = 128;     // queries per tile and keys per block
inline constexpr int kChunk = 64;     // head_dim elements per 128-byte swizzled row
inline constexpr int kConsumers = 2;  // warpgroups of 64 query rows
inline constexpr int kConsumerRows = kTile / kConsumers;
inline constexpr int kWarpgroup = 128;  // threads
inline constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
inline constexpr int kTileSlots = 2;  // query tiles in shared memory: the next one loads early
// An SM has 64k registers. The copying warpgroup needs few, the two computing ones hold S, P and O.
inline constexpr int kProducerRegisters = 24;
inline constexpr int kConsumerRegisters = 240;

enum NamedBarrier : int {
  kScheduler0 = 1,  // consumer 0 waits here for its turn to issue matrix instructions
  kScheduler1 = 2,  // consumer 1 does
  kConsumer0 = 3,   // the four warps of consumer 0 wait for each other
  kConsumer1 = 4,   // the four warps of consumer 1 do
};

// One head of the launch. The pointers are those of HeadWork (kernels/attention.h).
struct HeadTask {
  const uint32_t* pattern;   // [num_query_blocks, pattern_words]; null: dense
  const uint32_t* last_row;  // [pattern_words]; may be null
  float* block_mass;         // [num_query_blocks, row_key_blocks]; may be null
  int head;
};

struct Launch {
  HeadTask tasks[kMaxHeadsPerLaunch];
  // [num_tiles] tile ids (task * num_query_blocks + query block), in the order of schedule.h. Null:
  // CTA i computes tile i and no other.
  const uint32_t* order;
  int* next_tile;  // the next place in the order; zero at the start, unused without an order
  // [gridDim.x, kConsumers, row_key_blocks, kConsumerRows]: log2 of the weight of every (key block,
  // query row) of the tile that a CTA computes. Used by heads with block mass alone.
  float* row_weights;
  int num_tiles;
  int num_query_blocks;
  int row_key_blocks;     // as kernels/attention.h
  int first_query_block;  // the absolute position of query block 0
  int skipped_queries;    // positions of query block 0 that lie before query 0
  int num_queries;
  int group;  // query heads per KV head
  int pattern_words;
  float scale_log2;  // scale * log2(e)
};

// The queries of one tile. They are rows 0 .. rows - 1 of the tile. Later rows hold queries of
// another tile, or nothing, and are neither stored nor counted.
struct TileQueries {
  int first;     // the query in row 0
  int rows;      // 1 .. kTile
  int position;  // of row 0 within its block: 0, except in a first block that begins before query 0
};

__device__ inline TileQueries queries_of(const Launch& launch, int query_block) {
  TileQueries tile;
  tile.position = query_block == 0 ? launch.skipped_queries : 0;
  tile.first = query_block == 0 ? 0 : query_block * kTile - launch.skipped_queries;
  tile.rows = min(kTile - tile.position, launch.num_queries - tile.first);
  return tile;
}

template <int kHeadDim>
struct SharedStorage {
  static constexpr int kStages = 2;
  static constexpr int kTileElements = kTile * kHeadDim;

  // Each tile is [head_dim / 64][128 rows][64], with 128-byte swizzle. The output leaves through q.
  alignas(1024) __nv_bfloat16 q[kTileSlots][kTileElements];
  alignas(1024) __nv_bfloat16 k[kStages][kTileElements];
  alignas(1024) __nv_bfloat16 v[kStages][kTileElements];
  float log_sum[kTile];  // log2 of each row's sum, for block mass
  uint64_t tile_full[kTileSlots], tile_empty[kTileSlots];
  uint64_t k_full[kStages], k_empty[kStages];
  uint64_t v_full[kStages], v_empty[kStages];
  int tile_id[kTileSlots];      // -1: no tile is left
  int tile_blocks[kTileSlots];  // the number of key blocks of the tile
};

}  // namespace prefilld::kernels::cuda::sm90

#endif  // PREFILLD_KERNELS_CUDA_ATTENTION_SM90_CONFIG_H_
