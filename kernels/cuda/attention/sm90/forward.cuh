// The Hopper attention kernel: its consumers and its entry.
//
// Arithmetic. One (query block, key block) pair at head_dim 128 is 4 * 128^3 = 8.4 MFLOP; an SM's
// tensor cores do 4096 bf16 FLOP a cycle, so it takes them 2048 cycles. Every pair reads its own 64
// KiB of K and V, which come from L2 at about 32 B a cycle and SM: 2048 cycles as well. The copies
// overlap with the products, so both are near their limit together. The 128^2 exponentials take
// 1024 cycles of the special-function unit (16 a cycle) and must hide behind the other warpgroup's
// matrix instructions. Hence two consumers take turns (kScheduler0/1), and each issues the next
// block's Q K^T before this block's P V.
//
// Measured (H200): the assembler moves the wait for P V up, before the softmax. Pinning it behind
// the softmax, so that a consumer overlaps with itself too, made dense attention 7 to 15 % slower:
// the consumers' turns are enough, and an early softmax only takes issue slots from the other one.
#ifndef PREFILLD_KERNELS_CUDA_ATTENTION_SM90_FORWARD_CUH_
#define PREFILLD_KERNELS_CUDA_ATTENTION_SM90_FORWARD_CUH_

#include "kernels/cuda/attention/sm90/config.h"
#include "kernels/cuda/attention/sm90/producer.cuh"
#include "kernels/cuda/attention/sm90/softmax.cuh"
#include "kernels/cuda/device/accumulator.cuh"
#include "kernels/cuda/device/arithmetic.cuh"
#include "kernels/cuda/device/mbarrier.cuh"
#include "kernels/cuda/device/ring.cuh"
#include "kernels/cuda/device/tma.cuh"
#include "kernels/cuda/device/wgmma.cuh"

namespace prefilld::kernels::cuda::sm90 {

// One consumer warpgroup. It computes 64 rows of every tile.
template <int kHeadDim, bool kBlockMass>
class Consumer {
 public:
  using Storage = SharedStorage<kHeadDim>;

  __device__ Consumer(const Launch& launch, Storage& shared, const CUtensorMap& out_map,
                      const CUtensorMap& first_out_map)
      : launch_(launch),
        shared_(shared),
        out_map_(out_map),
        first_out_map_(first_out_map),
        index_(threadIdx.x / kWarpgroup - 1),
        thread_(threadIdx.x % kWarpgroup) {}

  __device__ void run() {
    using namespace device;
    // Consumer 0 goes first.
    if (index_ == 1) named_barrier_arrive(kScheduler0, kConsumers * kWarpgroup);
    device::RingPosition<kTileSlots> slot;
    for (;;) {
      mbarrier_wait(&shared_.tile_full[slot.stage], slot.parity);
      const int tile = shared_.tile_id[slot.stage];
      if (tile < 0) return;
      compute_tile(tile, slot.stage, shared_.tile_blocks[slot.stage]);
      slot.advance();
    }
  }

 private:
  static constexpr int kChunks = kHeadDim / kChunk;
  static constexpr int kOutRegisters = kHeadDim / 2;

  // Starts s = Q K^T for this warpgroup's 64 rows and one key block.
  __device__ void issue_qk(float (&s)[64], const __nv_bfloat16* q, const __nv_bfloat16* k) {
    using namespace device;
    const uint64_t a = swizzled_tile_descriptor(q, 0);
    const uint64_t b = swizzled_tile_descriptor(k, 0);
    constexpr uint32_t kChunkUnits = kTile * kChunk * 2 / 16;  // descriptors count 16 bytes
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
#pragma unroll
      for (int i = 0; i < kChunk / 16; ++i) {
        const uint32_t step = c * kChunkUnits + i * 2;
        wgmma_m64n128k16_ss(s, a + step, b + step, c + i > 0);
      }
    }
    wgmma_commit();
  }

  // Starts o = P V, or o += P V, for one key block.
  __device__ void issue_pv(float (&o)[kOutRegisters], const uint32_t (&p)[8][4],
                           const __nv_bfloat16* v, bool accumulate) {
    using namespace device;
    const uint64_t b = swizzled_tile_descriptor(v, kTile * kChunk * 2);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint64_t step = b + i * (16 * kChunk * 2 / 16);
      if constexpr (kHeadDim == 128) {
        wgmma_m64n128k16_rs(o, p[i], step, accumulate || i > 0);
      } else {
        wgmma_m64n64k16_rs(o, p[i], step, accumulate || i > 0);
      }
    }
    wgmma_commit();
  }

  // p = s in bf16, as the operand A of P V.
  __device__ static void to_bf16(const float (&s)[64], uint32_t (&p)[8][4]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) device::to_operand_a(s + 8 * i, s + 8 * i + 4, p[i]);
  }

  // The row of the tile that this thread's first accumulators belong to.
  __device__ int row_in_tile() const {
    return index_ * 64 + thread_ / 32 * 16 + device::accumulator_row(thread_);
  }

  // Masks the keys of the diagonal block that come after a row's own position.
  __device__ void mask_diagonal(float (&s)[64], int first_position) const {
    using namespace device;
    const int row = first_position + row_in_tile();
    const int column = accumulator_column(thread_);
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      if (column + element_column(i) > row + element_row(i)) s[i] = -INFINITY;
    }
  }

  // The scratch memory in which this consumer keeps the weights of its rows on the tile's key
  // blocks.
  __device__ float* row_weights() const {
    return launch_.row_weights + (static_cast<int64_t>(blockIdx.x) * kConsumers + index_) *
                                     launch_.row_key_blocks * kConsumerRows;
  }

  // Writes, for each row, log2 of its weight on one key block, from which the final log-sum will be
  // subtracted, and moves on to the next block. It is called between the products and costs no time
  // there, as it is short and has no branch: the assembler mixes it with them.
  __device__ void record(float*& weights, const Softmax& softmax, const float (&block_sum)[2]) {
    using namespace device;
    const bool odd = thread_ % 2 != 0;
    const float sum = quad_row_sums(block_sum, odd);
    const float weight = (odd ? softmax.max[1] : softmax.max[0]) + log2_approx(sum);
    // The weights are read once, at the end of the tile, and must not displace K and V in L2.
    if (thread_ % 4 < 2) __stcs(weights, weight);
    weights += kConsumerRows;
  }

  __device__ void arrive_empty(uint64_t* barrier) {
    if (thread_ == 0) device::mbarrier_arrive(barrier);
  }

  __device__ void compute_tile(int tile, int slot, int num_blocks) {
    using namespace device;
    const int row = tile % launch_.num_query_blocks;
    const HeadTask& task = launch_.tasks[tile / launch_.num_query_blocks];
    const TileQueries queries = queries_of(launch_, row);
    const __nv_bfloat16* q = shared_.q[slot] + index_ * 64 * kChunk;

    float s[64];
    float o[kOutRegisters];
    uint32_t p[8][4];
    float rescale[2], block_sum[2];
    Softmax softmax;
    float* weights = row_weights() + row_in_tile() % kConsumerRows + 8 * (thread_ % 2);

    mbarrier_wait(&shared_.k_full[k_ring_.stage], k_ring_.parity);
    wgmma_fence();
    issue_qk(s, q, shared_.k[k_ring_.stage]);
    wgmma_wait<0>();
    keep_in_order(s);
    arrive_empty(&shared_.k_empty[k_ring_.stage]);
    k_ring_.advance();
    mask_diagonal(s, queries.position);
    softmax.update(s, launch_.scale_log2, rescale, block_sum);
    to_bf16(s, p);

    for (int i = 1; i < num_blocks; ++i) {
      mbarrier_wait(&shared_.k_full[k_ring_.stage], k_ring_.parity);
      named_barrier_sync(kScheduler0 + index_, kConsumers * kWarpgroup);
      wgmma_fence();
      issue_qk(s, q, shared_.k[k_ring_.stage]);
      if constexpr (kBlockMass) record(weights, softmax, block_sum);  // for the previous block
      mbarrier_wait(&shared_.v_full[v_ring_.stage], v_ring_.parity);
      issue_pv(o, p, shared_.v[v_ring_.stage], i > 1);
      named_barrier_arrive(kScheduler0 + (1 - index_), kConsumers * kWarpgroup);
      wgmma_wait<1>();
      keep_in_order(s);
      arrive_empty(&shared_.k_empty[k_ring_.stage]);
      k_ring_.advance();
      softmax.update(s, launch_.scale_log2, rescale, block_sum);
      wgmma_wait<0>();
      keep_in_order(o);
      keep_in_order(p);
      arrive_empty(&shared_.v_empty[v_ring_.stage]);
      v_ring_.advance();
      to_bf16(s, p);
#pragma unroll
      for (int j = 0; j < kOutRegisters; ++j) o[j] *= rescale[j / 2 % 2];
    }
    mbarrier_wait(&shared_.v_full[v_ring_.stage], v_ring_.parity);
    wgmma_fence();
    issue_pv(o, p, shared_.v[v_ring_.stage], num_blocks > 1);
    if constexpr (kBlockMass) record(weights, softmax, block_sum);
    const float sum[2] = {quad_sum(softmax.sum[0]), quad_sum(softmax.sum[1])};
    wgmma_wait<0>();
    keep_in_order(o);
    arrive_empty(&shared_.v_empty[v_ring_.stage]);
    v_ring_.advance();

    store_output(o, sum, task.head, queries, slot);
    if constexpr (kBlockMass) add_block_mass(task, row, queries, num_blocks, softmax, sum);
  }

  // Divides by the rows' sums, and sends the tile out through the shared memory that its queries
  // came in.
  __device__ void store_output(const float (&o)[kOutRegisters], const float (&sum)[2], int head,
                               const TileQueries& queries, int slot) {
    using namespace device;
    const float inverse[2] = {1.0f / sum[0], 1.0f / sum[1]};
    __nv_bfloat16* tile = shared_.q[slot] + index_ * 64 * kChunk;
#pragma unroll
    for (int j = 0; j < kHeadDim / 16; ++j) {
      uint32_t pairs[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* x = o + 8 * j + 2 * i;
        pairs[i] = pack_bf16(x[0] * inverse[i % 2], x[1] * inverse[i % 2]);
      }
      store_swizzled(tile, kTile * kChunk, thread_, j, pairs);
    }
    fence_async_shared();
    named_barrier_sync(kConsumer0 + index_, kWarpgroup);
    if (thread_ == 0) {
      const CUtensorMap& map = queries.position > 0 ? first_out_map_ : out_map_;
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        tma_store_3d(&map, tile + c * kTile * kChunk, c * kChunk, head,
                     queries.first + index_ * 64);
      }
      tma_store_commit();
      tma_store_wait_read();  // the slot's memory is free for the next queries
    }
    mbarrier_arrive(&shared_.tile_empty[slot]);  // every thread has read the slot's tile_id
  }

  // Adds this consumer's part of the tile's block mass: for each key block, the mean over the
  // tile's query rows of the probability on it. Both consumers add to zeros, so that neither waits
  // for the other, and the sum does not depend on which comes first.
  __device__ void add_block_mass(const HeadTask& task, int row, const TileQueries& queries,
                                 int num_blocks, const Softmax& softmax, const float (&sum)[2]) {
    using namespace device;
    if (task.block_mass == nullptr) return;
    float* log_sums = shared_.log_sum + index_ * kConsumerRows;
    if (thread_ % 4 < 2) {
      const bool odd = thread_ % 2 != 0;  // a run-time index would put the arrays in local memory
      const int my_row = row_in_tile() + 8 * odd;
      const float log_sum =
          odd ? softmax.max[1] + log2_approx(sum[1]) : softmax.max[0] + log2_approx(sum[0]);
      // Rows without a query have no weight.
      shared_.log_sum[my_row] = my_row < queries.rows ? log_sum : INFINITY;
    }
    // The warps of the consumer see each other's log-sums and row weights.
    named_barrier_sync(kConsumer0 + index_, kWarpgroup);
    const int lane = thread_ % 32;
    const float2 log_sum = reinterpret_cast<const float2*>(log_sums)[lane];
    const auto* weights = reinterpret_cast<const float2*>(row_weights()) + lane;
    const float inverse = 1.0f / static_cast<float>(queries.rows);
    // The head is dense, so its blocks come in order, from the diagonal down.
    float* out = task.block_mass + static_cast<int64_t>(row) * launch_.row_key_blocks +
                 launch_.first_query_block + row;
    constexpr int kBatch = 16;  // blocks under way at a time in each warp
    constexpr int kWarps = kWarpgroup / 32;
    for (int first = thread_ / 32 * kBatch; first < num_blocks; first += kWarps * kBatch) {
      float2 weight[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        weight[j] = __ldcs(weights + min(first + j, num_blocks - 1) * (kConsumerRows / 2));
      }
      float mass[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        mass[j] = exp2_approx(weight[j].x - log_sum.x) + exp2_approx(weight[j].y - log_sum.y);
      }
      const float total = warp_sums(mass);
      const int block = first + lane / 2;
      if (lane % 2 == 0 && block < num_blocks) atomicAdd(out - block, total * inverse);
    }
    // The next tile overwrites the weights.
    named_barrier_sync(kConsumer0 + index_, kWarpgroup);
  }

  const Launch& launch_;
  Storage& shared_;
  const CUtensorMap& out_map_;
  const CUtensorMap& first_out_map_;  // for a first tile that begins within a block; ends with it
  const int index_;
  const int thread_;
  device::RingPosition<Storage::kStages> k_ring_, v_ring_;
};

template <int kHeadDim, bool kBlockMass>
__global__ void __launch_bounds__(kThreads, 1)
    attention_kernel(const __grid_constant__ Launch launch,
                     const __grid_constant__ CUtensorMap q_map,
                     const __grid_constant__ CUtensorMap k_map,
                     const __grid_constant__ CUtensorMap v_map,
                     const __grid_constant__ CUtensorMap out_map,
                     const __grid_constant__ CUtensorMap first_out_map) {
  using namespace device;
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<SharedStorage<kHeadDim>*>(memory);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kTileSlots; ++i) {
      mbarrier_init(&shared.tile_full[i], 1);
      mbarrier_init(&shared.tile_empty[i], kConsumers * kWarpgroup);
    }
    for (int i = 0; i < SharedStorage<kHeadDim>::kStages; ++i) {
      mbarrier_init(&shared.k_full[i], 1);
      mbarrier_init(&shared.v_full[i], 1);
      mbarrier_init(&shared.k_empty[i], kConsumers);
      mbarrier_init(&shared.v_empty[i], kConsumers);
    }
    fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x < kWarpgroup) {
    register_decrease<kProducerRegisters>();
    if (threadIdx.x < 32) produce<kHeadDim>(launch, shared, q_map, k_map, v_map);
  } else {
    register_increase<kConsumerRegisters>();
    Consumer<kHeadDim, kBlockMass>(launch, shared, out_map, first_out_map).run();
  }
}

}  // namespace prefilld::kernels::cuda::sm90

#endif  // PREFILLD_KERNELS_CUDA_ATTENTION_SM90_FORWARD_CUH_
