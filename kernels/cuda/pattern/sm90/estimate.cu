// The Hopper estimate.
//
// Arithmetic, at 28 heads of 128 and 128k keys: two passes of Q K^T (pattern/sm80/estimate.cu says
// why two), 120 GFLOP each, 0.13 ms of the tensor cores. Every logit takes one exponential in
// either pass: 470 M of them, 0.13 ms of the special-function units at 16 a cycle and SM. Both must
// run side by side, and all else beneath them, about 4 instructions per logit and lane: four
// consumer warpgroups take turns at the tensor cores while the others work on their logits. K is
// 134 MB; the heads of a KV head are computed at the same time, so that DRAM is read once.
//
// A CTA takes a head and a group of 16 key blocks at a time, one block for each consumer warp, and
// goes through the blocks side by side, 16 keys of each in a step: a step's tile has 256 rows, 16
// of every block, so that each warp gets 16 consecutive keys.
//
// Row sums: rows of the product are queries, columns the keys of half a tile. A thread keeps
// maximum and sum of its two rows.
// Masses: rows of the product are keys, columns the queries. A key's mass is then a sum along a
// row, and the diagonals, on which query - key is constant, run through the registers of a thread
// from step to step: it adds up its window of 34 partial sums, of which each step completes four,
// and only those are added up over the warp's lanes. No atomics: the same result every time.
#include <cuda_bf16.h>

#include <cmath>
#include <cstdint>
#include <limits>

#include "kernels/attention.h"
#include "kernels/cuda/device/arithmetic.cuh"
#include "kernels/cuda/device/mbarrier.cuh"
#include "kernels/cuda/device/tma.cuh"
#include "kernels/cuda/device/wgmma.cuh"
#include "kernels/cuda/pattern/estimate_plan.h"
#include "kernels/cuda/pattern/sm90/estimate.h"
#include "kernels/cuda/tensor_map.h"

namespace prefilld::kernels::cuda::sm90 {
namespace {

constexpr int kBlock = kEstimateBlock;
constexpr int kChunk = 64;  // head_dim elements per 128-byte swizzled row
constexpr int kWarpgroup = 128;
constexpr int kConsumers = 4;
constexpr int kConsumerWarps = kConsumers * kWarpgroup / 32;
constexpr int kThreads = (kConsumers + 1) * kWarpgroup;  // the last one copies
// Of the 96 that a thread of so many has.
constexpr int kProducerRegisters = 24;
constexpr int kConsumerRegisters = 112;
constexpr int kStepKeys = 16;
constexpr int kSteps = kBlock / kStepKeys;
constexpr int kTileRows = kConsumerWarps * kStepKeys;
constexpr int kGroupKeys = kEstimateGroupBlocks * kBlock;
constexpr int kQuerySlots = 2;  // the next head's queries load early
static_assert(kConsumerWarps == kEstimateGroupBlocks, "each consumer warp has its own block");

// Consumer w may issue its matrix instructions: kFirstTurn + w.
constexpr int kFirstTurn = 1;

struct Launch {
  EstimateParams op;
  float scale_log2;
  int num_groups;
  int num_items;
  int num_key_blocks;
  int64_t first_position;  // of the queries
  float2* row_sums;        // [heads, 2 * num_groups, kBlock]: maximum (log2 scale) and sum
  float* row_lse;          // [heads, kBlock]: log2 of (the whole row's sum * num_queries)
  float* overhangs;        // [heads, num_groups - 1, kBlock]: lower diagonals of the last block
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

// The copying thread.
template <int kHeadDim, bool kMass>
__device__ inline void produce(const Launch& launch, SharedStorage<kHeadDim>& shared,
                               const CUtensorMap& q_map, const CUtensorMap& k_map) {
  using namespace device;
  using Storage = SharedStorage<kHeadDim>;
  constexpr uint32_t kQueryBytes = sizeof(shared.q[0]) + (kMass ? sizeof(shared.lse[0]) : 0);
  constexpr uint32_t kQuarterBytes = sizeof(shared.k[0]) / kConsumers;
  constexpr int kQuarterWarps = kConsumerWarps / kConsumers;
  for (int i = 0; item_number(i) < launch.num_items; ++i) {
    const Item item(launch, item_number(i));
    const RingPosition<kQuerySlots> slot(i);
    const int kv_head = item.head / (launch.op.num_heads / launch.op.num_kv_heads);
    mbarrier_wait(&shared.q_empty[slot.place], slot.parity ^ 1);
    uint64_t* q_full = &shared.q_full[slot.place];
    mbarrier_arrive_expect(q_full, kQueryBytes);
#pragma unroll
    for (int c = 0; c < Storage::kChunks; ++c) {
      tma_load_3d(shared.q[slot.place] + c * kBlock * kChunk, &q_map, q_full, c * kChunk, item.head,
                  0);
    }
    if constexpr (kMass) {
      bulk_load(shared.lse[slot.place], launch.row_lse + item.head * kBlock, sizeof(shared.lse[0]),
                q_full);
    }
    for (int step = 0; step < kSteps; ++step) {
      const RingPosition<Storage::kStages> ring(step);
      for (int quarter = 0; quarter < kConsumers; ++quarter) {
        uint64_t* full = &shared.k_full[ring.place][quarter];
        mbarrier_wait(&shared.k_empty[ring.place][quarter], ring.parity ^ 1);
        mbarrier_arrive_expect(full, kQuarterBytes);
#pragma unroll
        for (int w = 0; w < kQuarterWarps; ++w) {
          const int block = quarter * kQuarterWarps + w;
          const int key = item.group * kGroupKeys + block * kBlock + step * kStepKeys;
#pragma unroll
          for (int c = 0; c < Storage::kChunks; ++c) {
            tma_load_3d(shared.k[ring.place] + (c * kTileRows + block * kStepKeys) * kChunk, &k_map,
                        full, c * kChunk, key, kv_head);
          }
        }
      }
    }
  }
}

// The compiler does not know that matrix instructions finish late: what they write must not be
// touched before the wait that precedes this call.
__device__ inline void keep_in_order(float (&x)[64]) {
#pragma unroll
  for (int i = 0; i < 64; ++i) asm volatile("" : "+f"(x[i])::"memory");
}

// s = A B^T of 64 rows of one tile and 128 of another, which have kRowsA and kRowsB in all.
template <int kHeadDim, int kRowsA, int kRowsB>
__device__ inline void issue_product(float (&s)[64], const __nv_bfloat16* a,
                                     const __nv_bfloat16* b) {
  using namespace device;
  constexpr uint32_t kUnit = 16;  // bytes that descriptors count in
  const uint64_t a_tile = swizzled_tile_descriptor(a, 0);
  const uint64_t b_tile = swizzled_tile_descriptor(b, 0);
#pragma unroll
  for (int c = 0; c < kHeadDim / kChunk; ++c) {
#pragma unroll
    for (int i = 0; i < kChunk / 16; ++i) {
      wgmma_m64n128k16_ss(s, a_tile + (c * kRowsA * kChunk * 2 / kUnit + i * 2),
                          b_tile + (c * kRowsB * kChunk * 2 / kUnit + i * 2), c + i > 0);
    }
  }
  wgmma_commit();
}

// Where a consumer thread's logits lie: element 4 j + 2 h + e of a product is row 8 h + row of its
// warp's 16, column 8 j + column + e. Made anew where it is used: what a loop would keep of it and
// of what follows from it is registers that the second pass does not have.
struct Place {
  __device__ Place() {
    const int thread = device::opaque(static_cast<int>(threadIdx.x));
    warp = thread / 32;
    consumer = thread / kWarpgroup;
    row = thread % 32 / 4;
    quad_lane = thread % 4;
    column = 2 * quad_lane;
  }
  int warp;  // of all consumers'
  int consumer;
  int row;
  int quad_lane;
  int column;
};

// Keys up to which query i sees, less i, from `first_key` on. Far more than there are: no mask.
__device__ inline int visible_keys(const Launch& launch, int64_t first_key) {
  return static_cast<int>(
      min(launch.first_position - first_key, static_cast<int64_t>(2 * kGroupKeys)));
}

// First pass: consumer w computes queries 64 (w % 2) .. and the keys of half w / 2 of the tile.
template <int kHeadDim>
class RowSums {
 public:
  static constexpr bool kMass = false;
  using Storage = SharedStorage<kHeadDim>;

  __device__ RowSums(const Launch& launch, Storage& shared) : launch_(launch) {}

  // The quarters of a tile it reads.
  __device__ int first_quarter() const { return Place().consumer / 2 * 2; }
  static constexpr int kQuarters = 2;

  __device__ void begin(const Item& item) {
    const Place place;
    item_head_ = item.head;
    chunk_ = 2 * item.group + place.consumer / 2;
    visible_ = visible_keys(launch_, static_cast<int64_t>(item.group) * kGroupKeys);
    max_[0] = max_[1] = -INFINITY;
    sum_[0] = sum_[1] = 0.0f;
  }

  __device__ void issue(float (&s)[64], const __nv_bfloat16* q, const __nv_bfloat16* k) const {
    const Place place;
    issue_product<kHeadDim, kBlock, kTileRows>(s, q + place.consumer % 2 * 64 * kChunk,
                                               k + place.consumer / 2 * kTileRows / 2 * kChunk);
  }

  __device__ void add(float (&s)[64], int step, int) {
    if (visible_ < kGroupKeys) mask(s, step);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float largest = s[2 * h];
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        largest = fmaxf(largest, fmaxf(s[4 * j + 2 * h], s[4 * j + 2 * h + 1]));
      }
      // Each thread has a maximum of its own until the end.
      const float new_max = fmaxf(max_[h], largest * launch_.scale_log2);
      const float reference = new_max == -INFINITY ? 0.0f : new_max;
      float total[2] = {};
#pragma unroll
      for (int j = 0; j < 16; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          total[e] +=
              device::exp2_approx(fmaf(s[4 * j + 2 * h + e], launch_.scale_log2, -reference));
        }
      }
      sum_[h] = fmaf(sum_[h], device::exp2_approx(max_[h] - reference), total[0] + total[1]);
      max_[h] = new_max;
    }
  }

  __device__ void end(int) {
    const Place place;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float quad_max = device::quad_max(max_[h]);
      const float reference = quad_max == -INFINITY ? 0.0f : quad_max;
      sum_[h] = device::quad_sum(sum_[h] * device::exp2_approx(max_[h] - reference));
      max_[h] = quad_max;
    }
    if (place.quad_lane > 1) return;
    const bool second = place.quad_lane == 1;  // a run-time index would cost local memory
    float2* rows = launch_.row_sums +
                   (static_cast<int64_t>(item_head_) * 2 * launch_.num_groups + chunk_) * kBlock;
    rows[query() + (second ? 8 : 0)] =
        second ? make_float2(max_[1], sum_[1]) : make_float2(max_[0], sum_[0]);
  }

 private:
  __device__ int query() const {
    const Place place;
    return place.consumer % 2 * 64 + place.warp % 4 * 16 + place.row;
  }

  __device__ void mask(float (&s)[64], int step) const {
    const Place place;
    const int first_block = place.consumer / 2 * (kEstimateGroupBlocks / 2);
    const int last_key = visible_ + query();
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      // Column 16 b + k of the product is key k of the step's in block b.
      const int column = i / 4 * 8 + place.column + i % 2;
      const int key =
          (first_block + column / kStepKeys) * kBlock + step * kStepKeys + column % kStepKeys;
      if (key > last_key + i / 2 % 2 * 8) s[i] = -INFINITY;
    }
  }

  const Launch& launch_;
  int item_head_ = 0;
  int chunk_ = 0;
  int visible_ = 0;
  float max_[2];
  float sum_[2];
};

// Second pass: every consumer computes all queries and its own quarter of the tile.
template <int kHeadDim>
class Masses {
 public:
  static constexpr bool kMass = true;
  using Storage = SharedStorage<kHeadDim>;

  __device__ Masses(const Launch& launch, Storage& shared) : launch_(launch), shared_(shared) {}

  __device__ int first_quarter() const { return Place().consumer; }
  static constexpr int kQuarters = 1;

  __device__ void begin(const Item& item) {
    head_ = item.head;
    group_ = item.group;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      carry_[e] = 0.0f;
#pragma unroll
      for (int i = 0; i < kWindow; ++i) window_[i][e] = 0.0f;
    }
  }

  __device__ void issue(float (&s)[64], const __nv_bfloat16* q, const __nv_bfloat16* k) const {
    const Place place;
    issue_product<kHeadDim, kTileRows, kBlock>(s, k + place.consumer * 64 * kChunk, q);
  }

  __device__ void add(float (&s)[64], int step, int slot) {
    const Place place;
    if (const int visible = visible_keys(launch_, first_key()); visible < kBlock) {
      mask(s, step, visible);
    }
    float key_mass[2] = {};
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      const float2 lse = *reinterpret_cast<const float2*>(&shared_.lse[slot][8 * j + place.column]);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float* p = s + 4 * j + 2 * h;
        p[0] = device::exp2_approx(fmaf(p[0], launch_.scale_log2, -lse.x));
        p[1] = device::exp2_approx(fmaf(p[1], launch_.scale_log2, -lse.y));
        key_mass[h] += p[0] + p[1];
      }
    }
    write_key_mass(key_mass, step);
    // The window moves down by the step's 16 keys, and the new probabilities come in.
#pragma unroll
    for (int i = kWindow - 1; i >= 0; --i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float sum = i >= 2 ? window_[i - 2][e] : 0.0f;
        if (i >= 1) sum += s[4 * (i - 1) + e];
        if (i <= 15) sum += s[4 * i + 2 + e];
        window_[i][e] = sum;
      }
    }
    write_diagonals(step);
  }

  __device__ void end(int item_count) {
    const Place place;
    // What is still in the window: diagonals that begin below the block's first key.
#pragma unroll 1
    for (int step = kSteps; step < 2 * kSteps; ++step) {
#pragma unroll
      for (int i = kWindow - 1; i >= 0; --i) {
#pragma unroll
        for (int e = 0; e < 2; ++e) window_[i][e] = i >= 2 ? window_[i - 2][e] : 0.0f;
      }
      write_diagonals(step);
    }
    const int lane = static_cast<int>(threadIdx.x) % 32;
    __syncwarp();
    if (lane == 0) device::mbarrier_arrive(&shared_.diagonals_full[place.warp]);
    write_block_mass(lane);
    write_slash(lane, RingPosition<1>(item_count).parity);
  }

 private:
  // window_[i][e] is the sum over the diagonal query - key = 8 (i - 1) + column + e - row, counted
  // from the block's first key plus 16 a step: of elements (h, j) those with j - h = i - 1.
  static constexpr int kWindow = 17;

  __device__ int block() const { return group_ * kEstimateGroupBlocks + Place().warp; }
  __device__ int64_t first_key() const { return static_cast<int64_t>(block()) * kBlock; }

  __device__ static void mask(float (&s)[64], int step, int visible) {
    const Place place;
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      const int key = step * kStepKeys + place.row + i / 2 % 2 * 8;
      const int query = i / 4 * 8 + place.column + i % 2;
      if (key > visible + query) s[i] = -INFINITY;
    }
  }

  // Adds up over the four lanes of a row: even lanes end up with row h = 0, odd ones with h = 1.
  __device__ void write_key_mass(const float (&key_mass)[2], int step) {
    const Place place;
    const bool odd = place.quad_lane % 2 == 1;
    float sum = odd ? key_mass[1] : key_mass[0];
    sum += __shfl_xor_sync(~0u, odd ? key_mass[0] : key_mass[1], 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    if (place.quad_lane > 1) return;
    const int64_t key = first_key() + step * kStepKeys + place.row + (odd ? 8 : 0);
    if (key < launch_.op.num_keys) {
      launch_.op.vertical[head_ * launch_.op.num_keys + key] = sum;
    }
  }

  // Completes the 16 uppermost diagonals of the window, in two runs of eight: run 14 and run 15,
  // where run b is 8 b .. 8 b + 7. A lane's diagonals of window_[i] are in run i - 1, or in run i -
  // 2 where column + e < row.
  __device__ void write_diagonals(int step) {
    const Place place;
    float runs[2];
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      float value[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const bool below = place.column + e < place.row;
        const float above = b == 1 ? carry_[e] : window_[16][e];  // what was window_[17] is carried
        value[e] = below ? above : window_[15 + b][e];
      }
      // Element e = 1 of the lane one row further down lies on the same diagonal as e = 0 here.
      const int next_row = (place.row + 1) % 8 * 4 + place.quad_lane;
      runs[b] = value[0] + __shfl_sync(~0u, value[1], next_row);
    }
    carry_[0] = window_[15][0];
    carry_[1] = window_[15][1];
    // Then diagonal (column - row) mod 8 of a run is spread over four lanes, two rows apart. Even
    // lanes collect run 14, odd ones run 15.
    const bool odd = place.quad_lane % 2 == 1;
    const int neighbour = (place.row + (odd ? 6 : 2)) % 8 * 4 + (place.quad_lane ^ 1);
    float sum = odd ? runs[1] : runs[0];
    sum += __shfl_sync(~0u, odd ? runs[0] : runs[1], neighbour);
    sum += __shfl_xor_sync(~0u, sum, 4 * 4 + 2);  // four rows and two lanes on
    if (place.quad_lane > 1) return;
    const int diagonal = 8 * (odd ? 15 : 14) + (place.column - place.row + 8) % 8;
    shared_.diagonals[place.warp][kBlock + diagonal - step * kStepKeys] = sum;
  }

  // All of the block lies on its diagonals.
  __device__ void write_block_mass(int lane) {
    const float* diagonals = shared_.diagonals[Place().warp];
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 2 * kBlock; i += 32) sum += diagonals[i + lane];
    sum = device::warp_sum(sum);
    if (lane != 0 || block() >= launch_.num_key_blocks) return;
    launch_.op.block_mass[static_cast<int64_t>(head_) * launch_.num_key_blocks + block()] = sum;
  }

  // The block's upper diagonals together with the lower ones of the block before.
  __device__ void write_slash(int lane, uint32_t parity) {
    const Place place;
    const bool has_previous = place.warp > 0;
    if (has_previous) device::mbarrier_wait(&shared_.diagonals_full[place.warp - 1], parity);
    const float* own = shared_.diagonals[place.warp];
    const float* previous = shared_.diagonals[has_previous ? place.warp - 1 : 0];
    const int64_t first_offset = launch_.first_position - first_key();
    float* slash = launch_.op.slash + head_ * launch_.op.num_keys;
    float* overhang = launch_.overhangs +
                      (static_cast<int64_t>(head_) * (launch_.num_groups - 1) + group_) * kBlock;
    const bool overhangs = place.warp == kConsumerWarps - 1 && group_ < launch_.num_groups - 1;
#pragma unroll
    for (int i = lane; i < kBlock; i += 32) {
      const float lower = previous[i];
      const float sum = own[kBlock + i] + (has_previous ? lower : 0.0f);
      const int64_t offset = first_offset + i;
      if (offset >= 0 && offset < launch_.op.num_keys) slash[offset] = sum;
      if (overhangs) overhang[i] = own[i];
    }
    // The warp after this one has read its predecessor's diagonals before those are written again,
    // a round of turns later.
  }

  const Launch& launch_;
  Storage& shared_;
  int head_ = 0;
  int group_ = 0;
  float window_[kWindow][2];
  float carry_[2];  // window_[15] of the step before, which is window_[17] now
};

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
    mbarrier_wait(&shared.q_full[slot.place], slot.parity);
    pass.begin(Item(launch, item_number(i)));
#pragma unroll 1
    for (int step = 0; step < kSteps; ++step) {
      const RingPosition<Storage::kStages> ring(step);
      float s[64];
#pragma unroll
      for (int q = 0; q < Pass::kQuarters; ++q) {
        mbarrier_wait(&shared.k_full[ring.place][pass.first_quarter() + q], ring.parity);
      }
      named_barrier_sync(turn(0), 2 * kWarpgroup);
      wgmma_fence();
      pass.issue(s, shared.q[slot.place], shared.k[ring.place]);
      named_barrier_arrive(turn(1), 2 * kWarpgroup);
      wgmma_wait<0>();
      keep_in_order(s);
      if (first_lane) {
#pragma unroll
        for (int q = 0; q < Pass::kQuarters; ++q) {
          mbarrier_arrive(&shared.k_empty[ring.place][pass.first_quarter() + q]);
        }
      }
      pass.add(s, step, slot.place);
    }
    __syncwarp();  // all lanes are done with the slot
    if (first_lane) mbarrier_arrive(&shared.q_empty[slot.place]);
    pass.end(i);
  }
}

template <typename Pass, int kHeadDim>
__global__ void __launch_bounds__(kThreads, 1)
    estimate_kernel(const __grid_constant__ Launch launch,
                    const __grid_constant__ CUtensorMap q_map,
                    const __grid_constant__ CUtensorMap k_map) {
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
        // Every warp that reads the quarter.
        mbarrier_init(&shared.k_empty[i][quarter], Pass::kQuarters * kConsumerWarps / kConsumers);
      }
    }
    for (int i = 0; i < kConsumerWarps; ++i) mbarrier_init(&shared.diagonals_full[i], 1);
    fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x < kConsumers * kWarpgroup) {
    register_increase<kConsumerRegisters>();
    consume<Pass>(launch, shared);
  } else {
    register_decrease<kProducerRegisters>();
    if (threadIdx.x == kConsumers * kWarpgroup) {
      produce<kHeadDim, Pass::kMass>(launch, shared, q_map, k_map);
    }
  }
}

constexpr int kMergeParts = 8;

// One CTA per head; a thread merges every eighth chunk of a row.
__global__ void __launch_bounds__(kMergeParts* kBlock)
    merge_row_sums_kernel(const __grid_constant__ Launch launch) {
  __shared__ float2 parts[kMergeParts][kBlock];
  const int row = static_cast<int>(threadIdx.x) % kBlock;
  const int part = static_cast<int>(threadIdx.x) / kBlock;
  const int num_chunks = 2 * launch.num_groups;
  const float2* row_sums =
      launch.row_sums + static_cast<int64_t>(blockIdx.x) * num_chunks * kBlock + row;
  const auto merge = [](float2& a, float2 b) {
    const float max = fmaxf(a.x, b.x);
    if (max == -INFINITY) return;
    a.y = a.y * device::exp2_approx(a.x - max) + b.y * device::exp2_approx(b.x - max);
    a.x = max;
  };
  float2 sum = make_float2(-INFINITY, 0.0f);
#pragma unroll 4
  for (int chunk = part; chunk < num_chunks; chunk += kMergeParts) {
    merge(sum, row_sums[static_cast<int64_t>(chunk) * kBlock]);
  }
  parts[part][row] = sum;
  __syncthreads();
  if (part != 0) return;
#pragma unroll
  for (int i = 1; i < kMergeParts; ++i) merge(sum, parts[i][row]);
  // With the share of one row in the mean; rows that hold no query get no mass.
  const float num_queries = static_cast<float>(launch.op.num_queries);
  launch.row_lse[blockIdx.x * kBlock + row] =
      row < launch.op.num_queries ? sum.x + device::log2_approx(sum.y * num_queries) : INFINITY;
}

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
cudaError_t LaunchPass(const Launch& launch, const CUtensorMap& q_map, const CUtensorMap& k_map,
                       int num_sms, cudaStream_t stream) {
  auto kernel = estimate_kernel<Pass, kHeadDim>;
  constexpr int kSharedBytes = sizeof(SharedStorage<kHeadDim>);
  static_assert(kSharedBytes <= 227 * 1024, "an SM has 227 KiB of shared memory for one block");
  if (cudaError_t error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
      error != cudaSuccess) {
    return error;
  }
  kernel<<<std::min(num_sms, launch.num_items), kThreads, kSharedBytes, stream>>>(launch, q_map,
                                                                                  k_map);
  return cudaGetLastError();
}

template <int kHeadDim>
cudaError_t LaunchKernels(const Launch& launch, const CUtensorMap& q_map, const CUtensorMap& k_map,
                          int num_sms, cudaStream_t stream) {
  cudaError_t error =
      LaunchPass<RowSums<kHeadDim>, kHeadDim>(launch, q_map, k_map, num_sms, stream);
  if (error != cudaSuccess) return error;
  merge_row_sums_kernel<<<launch.op.num_heads, kMergeParts * kBlock, 0, stream>>>(launch);
  error = LaunchPass<Masses<kHeadDim>, kHeadDim>(launch, q_map, k_map, num_sms, stream);
  if (error != cudaSuccess || launch.num_groups == 1) return error;
  add_overhangs_kernel<<<dim3(launch.num_groups - 1, launch.op.num_heads), kBlock, 0, stream>>>(
      launch);
  return cudaGetLastError();
}

}  // namespace

bool Supports(const EstimateParams& p) {
  // Positions of a group past the last key are still counted as int.
  return (p.head_dim == 64 || p.head_dim == 128) && p.block_tokens == kBlock &&
         p.kv_head_stride % 8 == 0 &&
         p.num_keys <= std::numeric_limits<int32_t>::max() - 2 * kGroupKeys;
}

cudaError_t LaunchEstimate(const EstimateParams& p, int num_sms, cudaStream_t stream) {
  Launch launch{};
  launch.op = p;
  launch.scale_log2 = p.scale * static_cast<float>(M_LOG2E);
  launch.num_groups = NumEstimateGroups(p.num_queries, p.num_keys);
  launch.num_items = launch.num_groups * p.num_heads;
  launch.num_key_blocks = static_cast<int>(CeilDiv(p.num_keys, kBlock));
  launch.first_position = p.num_keys - p.num_queries;
  const EstimateScratch scratch = LayOutEstimateScratch(launch.num_groups, p.num_heads);
  float* floats = static_cast<float*>(p.scratch);
  launch.row_sums = reinterpret_cast<float2*>(floats + scratch.row_sums);
  launch.row_lse = floats + scratch.row_lse;
  launch.overhangs = floats + scratch.overhangs;

  const uint64_t d = p.head_dim;
  const uint64_t heads = p.num_heads;
  CUtensorMap q_map, k_map;
  cudaError_t error = MakeTensorMap({.data = p.q,
                                     .dims = {d, heads, static_cast<uint64_t>(p.num_queries)},
                                     .strides = {d, d * heads},
                                     .box1 = 1,
                                     .box2 = kBlock},
                                    &q_map);
  if (error == cudaSuccess) {
    error = MakeTensorMap(
        {.data = p.k,
         .dims = {d, static_cast<uint64_t>(p.num_keys), static_cast<uint64_t>(p.num_kv_heads)},
         .strides = {d, static_cast<uint64_t>(p.kv_head_stride)},
         .box1 = kStepKeys,
         .box2 = 1},
        &k_map);
  }
  if (error != cudaSuccess) return error;
  return p.head_dim == 128 ? LaunchKernels<128>(launch, q_map, k_map, num_sms, stream)
                           : LaunchKernels<64>(launch, q_map, k_map, num_sms, stream);
}

}  // namespace prefilld::kernels::cuda::sm90
