// The copying warp of the Hopper attention kernel: it takes query tiles and brings their queries,
// keys and values into shared memory, where the consumers (forward.cuh) wait for them.
#ifndef PREFILLD_KERNELS_CUDA_ATTENTION_SM90_PRODUCER_CUH_
#define PREFILLD_KERNELS_CUDA_ATTENTION_SM90_PRODUCER_CUH_

#include "kernels/cuda/attention/sm90/config.h"
#include "kernels/cuda/device/mbarrier.cuh"
#include "kernels/cuda/device/ring.cuh"
#include "kernels/cuda/device/tma.cuh"

namespace prefilld::kernels::cuda::sm90 {

// Returns word `w` of a tile's row of its pattern, with the diagonal block set. A dense head's row
// has all causal blocks.
__device__ inline uint32_t pattern_word(const Launch& launch, const HeadTask& task, int row,
                                        int diagonal, int w) {
  if (w >= launch.pattern_words) return 0;
  const int bits_left = diagonal + 1 - w * 32;  // causal blocks from this word on
  const uint32_t causal = bits_left >= 32 ? ~0u : bits_left > 0 ? (1u << bits_left) - 1 : 0u;
  if (task.pattern == nullptr) return causal;
  uint32_t word = task.pattern[static_cast<int64_t>(row) * launch.pattern_words + w];
  if (task.last_row != nullptr && row == launch.num_query_blocks - 1) word |= task.last_row[w];
  if (w == diagonal / 32) word |= 1u << (diagonal % 32);
  return word & causal;
}

// Takes the next tile for this CTA and returns its place in the order. num_tiles or more means that
// there is none left. The whole warp calls it.
__device__ inline int take_tile(const Launch& launch, bool first) {
  if (launch.order == nullptr) return first ? static_cast<int>(blockIdx.x) : launch.num_tiles;
  int next = 0;
  if (threadIdx.x % 32 == 0) next = atomicAdd(launch.next_tile, 1);
  return __shfl_sync(~0u, next, 0);
}

// The copying warp's loop: takes tiles in order, and loads their key blocks, the diagonal one
// first.
template <int kHeadDim>
__device__ inline void produce(const Launch& launch, SharedStorage<kHeadDim>& shared,
                               const CUtensorMap& q_map, const CUtensorMap& k_map,
                               const CUtensorMap& v_map) {
  using namespace device;
  using Storage = SharedStorage<kHeadDim>;
  constexpr uint32_t kTileBytes = Storage::kTileElements * sizeof(__nv_bfloat16);
  const int lane = threadIdx.x % 32;
  device::RingPosition<kTileSlots> slot;
  device::RingPosition<Storage::kStages> k_ring, v_ring;

  auto load = [&](__nv_bfloat16* dst, const CUtensorMap& map, uint64_t* full, int block,
                  int kv_head) {
    mbarrier_arrive_expect(full, kTileBytes);
#pragma unroll
    for (int c = 0; c < kHeadDim / kChunk; ++c) {
      tma_load_3d(dst + c * kTile * kChunk, &map, full, c * kChunk, block * kTile, kv_head);
    }
  };

  bool first = true;
  for (;;) {
    const int next = take_tile(launch, first);
    first = false;
    mbarrier_wait(&shared.tile_empty[slot.stage], slot.parity ^ 1);
    if (next >= launch.num_tiles) {
      if (lane == 0) {
        shared.tile_id[slot.stage] = -1;
        mbarrier_arrive(&shared.tile_full[slot.stage]);
      }
      return;
    }
    const int tile = launch.order != nullptr ? static_cast<int>(launch.order[next]) : next;
    const int row = tile % launch.num_query_blocks;
    const HeadTask& task = launch.tasks[tile / launch.num_query_blocks];
    const int kv_head = task.head / launch.group;
    const int diagonal = launch.first_query_block + row;

    int num_blocks = 0;
    for (int w = lane; w * 32 <= diagonal; w += 32) {
      num_blocks += __popc(pattern_word(launch, task, row, diagonal, w));
    }
    num_blocks = __reduce_add_sync(~0u, num_blocks);
    if (lane == 0) {
      shared.tile_id[slot.stage] = tile;
      shared.tile_blocks[slot.stage] = num_blocks;
      mbarrier_arrive_expect(&shared.tile_full[slot.stage], kTileBytes);
      const int first = queries_of(launch, row).first;
#pragma unroll
      for (int c = 0; c < kHeadDim / kChunk; ++c) {
        tma_load_3d(shared.q[slot.stage] + c * kTile * kChunk, &q_map,
                    &shared.tile_full[slot.stage], c * kChunk, task.head, first);
      }
    }
    slot.advance();

    // K is loaded one block ahead of V, in the order in which the consumers use them.
    int previous = -1;
    auto feed_v = [&](int block) {
      mbarrier_wait(&shared.v_empty[v_ring.stage], v_ring.parity ^ 1);
      if (lane == 0) {
        load(shared.v[v_ring.stage], v_map, &shared.v_full[v_ring.stage], block, kv_head);
      }
      v_ring.advance();
    };
    for (int base = diagonal / 1024 * 32; base >= 0; base -= 32) {  // 32 words, one a lane
      const uint32_t words = pattern_word(launch, task, row, diagonal, base + lane);
      uint32_t pending = __ballot_sync(~0u, words != 0);
      while (pending != 0) {
        const int w = 31 - __clz(pending);
        pending ^= 1u << w;
        uint32_t word = __shfl_sync(~0u, words, w);
        while (word != 0) {
          const int bit = 31 - __clz(word);
          word ^= 1u << bit;
          const int block = (base + w) * 32 + bit;
          mbarrier_wait(&shared.k_empty[k_ring.stage], k_ring.parity ^ 1);
          if (lane == 0) {
            load(shared.k[k_ring.stage], k_map, &shared.k_full[k_ring.stage], block, kv_head);
          }
          k_ring.advance();
          if (previous >= 0) feed_v(previous);
          previous = block;
        }
      }
    }
    if (previous >= 0) feed_v(previous);
  }
}

}  // namespace prefilld::kernels::cuda::sm90

#endif  // PREFILLD_KERNELS_CUDA_ATTENTION_SM90_PRODUCER_CUH_
