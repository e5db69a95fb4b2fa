// Second pass of the Hopper estimate: the masses of keys, of diagonals and of blocks.
//
// Rows of the product are keys, columns are queries. So a key's mass is a sum along a row. A
// diagonal, on which query - key is constant, moves through the registers of a thread from step to
// step: the thread adds up a window of 34 partial sums, of which each step completes four, and only
// those are added up over the warp's lanes. The window and the logits leave no register to spare.
#ifndef PREFILLD_KERNELS_CUDA_PATTERN_SM90_MASSES_CUH_
#define PREFILLD_KERNELS_CUDA_PATTERN_SM90_MASSES_CUH_

#include "kernels/cuda/pattern/sm90/tiles.cuh"

namespace prefilld::kernels::cuda::sm90::estimate {

// The work of a consumer of the second pass. Every consumer takes all queries and its own quarter
// of the tile.
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

  __device__ static Operands operands(const __nv_bfloat16* q, const __nv_bfloat16* k) {
    return {k + Place().consumer * 64 * kChunk, q};
  }
  template <typename PassTurn>
  __device__ static void issue(float (&s)[64], const Operands& tiles, const PassTurn& pass_turn) {
    issue_product<kHeadDim, kTileRows, kBlock>(s, tiles, pass_turn);
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
    // The window still holds the diagonals that begin below the block's first key.
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
    device::mbarrier_arrive(&shared_.diagonals_full[place.warp]);
    __syncwarp();
    write_block_mass(lane);
    write_slash(lane, device::RingPosition<1>(item_count).parity);
  }

 private:
  // window_[i][e] is the sum over the diagonal query - key = 8 (i - 1) + column + e - row, where
  // the key is counted from the step's first one. These are the elements 4 j + 2 h + e with j - h =
  // i - 1.
  static constexpr int kWindow = 17;

  __device__ int block() const { return group_ * kEstimateGroupBlocks + Place().warp; }
  __device__ int first_key() const { return block() * kBlock; }

  __device__ static void mask(float (&s)[64], int step, int visible) {
    const Place place;
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      const int key = step * kStepKeys + place.row + device::element_row(i);
      const int query = place.column + device::element_column(i);
      if (key > visible + query) s[i] = -INFINITY;
    }
  }

  // Writes the masses of this thread's two keys, summed over the queries.
  __device__ void write_key_mass(const float (&key_mass)[2], int step) {
    const Place place;
    const bool odd = place.quad_lane % 2 == 1;
    const float sum = device::quad_row_sums(key_mass, odd);
    if (place.quad_lane > 1) return;
    const int key = first_key() + step * kStepKeys + place.row + (odd ? 8 : 0);
    if (key < launch_.op.num_keys) {
      launch_.op.vertical[head_ * launch_.op.num_keys + key] = sum;
    }
  }

  // Completes and writes the 16 uppermost diagonals of the window. They are two runs of eight, 14
  // and 15, where run b is diagonals 8 b .. 8 b + 7. A lane's diagonals of window_[i] are in run i
  // - 1, or in run i - 2 where column + e < row.
  __device__ void write_diagonals(int step) {
    const Place place;
    float runs[2];
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      float value[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const bool below = place.column + e < place.row;
        const float above = b == 1 ? carry_[e] : window_[16][e];  // window_[17] is in carry_
        value[e] = below ? above : window_[15 + b][e];
      }
      // Element e = 1 of the lane one row further down lies on the same diagonal as e = 0 here.
      const int next_row = (place.row + 1) % 8 * 4 + place.quad_lane;
      runs[b] = value[0] + __shfl_sync(~0u, value[1], next_row);
    }
    carry_[0] = window_[15][0];
    carry_[1] = window_[15][1];
    // Now diagonal (column - row) mod 8 of a run is spread over four lanes, two rows apart. Even
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

  // Writes the block's mass, which is the sum over its diagonals.
  __device__ void write_block_mass(int lane) {
    const float* diagonals = shared_.diagonals[Place().warp];
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 2 * kBlock; i += 32) sum += diagonals[i + lane];
    sum = device::warp_sum(sum);
    if (lane != 0 || block() >= launch_.num_key_blocks) return;
    launch_.op.block_mass[static_cast<int64_t>(head_) * launch_.num_key_blocks + block()] = sum;
  }

  // Writes the mass on diagonals: the block's upper ones together with the lower ones of the block
  // before, which lie at the same offsets.
  __device__ void write_slash(int lane, uint32_t parity) {
    const Place place;
    const bool has_previous = place.warp > 0;
    if (has_previous) device::mbarrier_wait(&shared_.diagonals_full[place.warp - 1], parity);
    const float* own = shared_.diagonals[place.warp];
    const float* previous = shared_.diagonals[has_previous ? place.warp - 1 : 0];
    const int first_offset = launch_.first_position - first_key();
    float* slash = launch_.op.slash + head_ * launch_.op.num_keys;
    float* overhang = launch_.overhangs +
                      (static_cast<int64_t>(head_) * (launch_.num_groups - 1) + group_) * kBlock;
    const bool overhangs = place.warp == kConsumerWarps - 1 && group_ < launch_.num_groups - 1;
#pragma unroll
    for (int i = lane; i < kBlock; i += 32) {
      const float lower = previous[i];
      const float sum = own[kBlock + i] + (has_previous ? lower : 0.0f);
      const int offset = first_offset + i;
      if (offset >= 0 && offset < launch_.op.num_keys) slash[offset] = sum;
      if (overhangs) overhang[i] = own[i];
    }
    // No barrier is needed before these diagonals are written again. The next warp reads their
    // lower half, which this warp rewrites only in the next call of end(), eight steps from here.
    // The next warp has then left this function, because consumers take turns in every step: none
    // gets two steps ahead of another.
  }

  const Launch& launch_;
  Storage& shared_;
  int head_ = 0;
  int group_ = 0;
  float window_[kWindow][2];
  float carry_[2];  // window_[15] of the step before, which would be window_[17] now
};

}  // namespace prefilld::kernels::cuda::sm90::estimate

#endif  // PREFILLD_KERNELS_CUDA_PATTERN_SM90_MASSES_CUH_
