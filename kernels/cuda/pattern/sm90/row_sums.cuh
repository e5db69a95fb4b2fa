// First pass of the Hopper estimate: the maximum and sum of every row.
#ifndef PREFILLD_KERNELS_CUDA_PATTERN_SM90_ROW_SUMS_CUH_
#define PREFILLD_KERNELS_CUDA_PATTERN_SM90_ROW_SUMS_CUH_

#include "kernels/cuda/pattern/sm90/tiles.cuh"

namespace prefilld::kernels::cuda::sm90::estimate {

// The work of a consumer of the first pass. Consumer w takes the 64 queries from 64 * (w % 2) on,
// and the keys of half w / 2 of the tile.
template <int kHeadDim>
class RowSums {
 public:
  static constexpr bool kMass = false;
  using Storage = SharedStorage<kHeadDim>;

  __device__ RowSums(const Launch& launch, Storage& shared) : launch_(launch) {}

  // It reads kQuarters quarters of a tile from first_quarter() on.
  __device__ int first_quarter() const { return Place().consumer / 2 * 2; }
  static constexpr int kQuarters = 2;

  __device__ void begin(const Item& item) {
    const Place place;
    item_head_ = item.head;
    chunk_ = 2 * item.group + place.consumer / 2;
    visible_ = visible_keys(launch_, item.group * kGroupKeys);
    max_[0] = max_[1] = -INFINITY;
    sum_[0] = sum_[1] = 0.0f;
  }

  __device__ static Operands operands(const __nv_bfloat16* q, const __nv_bfloat16* k) {
    const Place place;
    return {q + place.consumer % 2 * 64 * kChunk, k + place.consumer / 2 * kTileRows / 2 * kChunk};
  }
  template <typename PassTurn>
  __device__ static void issue(float (&s)[64], const Operands& tiles, const PassTurn& pass_turn) {
    issue_product<kHeadDim, kBlock, kTileRows>(s, tiles, pass_turn);
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
      // Until the end, each thread has a maximum of its own.
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
  // The query of this thread's first accumulators.
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
      // Column 16 b + k of the product is the step's key k of block b.
      const int column = place.column + device::element_column(i);
      const int key =
          (first_block + column / kStepKeys) * kBlock + step * kStepKeys + column % kStepKeys;
      if (key > last_key + device::element_row(i)) s[i] = -INFINITY;
    }
  }

  const Launch& launch_;
  int item_head_ = 0;
  int chunk_ = 0;
  int visible_ = 0;
  float max_[2];
  float sum_[2];
};

}  // namespace prefilld::kernels::cuda::sm90::estimate

#endif  // PREFILLD_KERNELS_CUDA_PATTERN_SM90_ROW_SUMS_CUH_
