// The smallest set of values whose sum reaches a share of the total, without sorting.
//
// Sorted from the largest down, with the lower index first among equals, the set is a prefix. Its
// last member's value is found digit by digit (radix select): a histogram of the sums and counts
// of the values by their leading bits says in which bin the prefix ends, then the same within that
// bin. Non-negative floats order as their bit patterns do.
//
// Sums are 64-bit fixed point with 52 fractional bits: exact for every value of at least 2^-28,
// off by at most 2^-53 each below, and the same in any order. Against a sum in floating point the
// set can differ only where the running sum passes the target by less than that sum's own
// rounding.
#ifndef PREFILLD_KERNELS_CUDA_PATTERN_SMALLEST_SET_CUH_
#define PREFILLD_KERNELS_CUDA_PATTERN_SMALLEST_SET_CUH_

#include <cstdint>

namespace prefilld::kernels::cuda {

__device__ __forceinline__ uint64_t to_fixed(float value) {
  return __float2ull_rn(value * 0x1p52f);
}

// A value as an unsigned integer of the same order; a NaN or negative value counts as 0.
__device__ __forceinline__ uint32_t order_bits(float value) {
  return value > 0.0f ? __float_as_uint(value) : 0u;
}

struct SmallestSet {
  uint32_t last = 0;        // order_bits of the smallest member
  int64_t last_index = -1;  // of the members equal to it, the highest index

  __device__ __forceinline__ bool contains(float value, int64_t index) const {
    const uint32_t bits = order_bits(value);
    return bits > last || (bits == last && index <= last_index);
  }
};

// The search by one CTA of kThreads threads. All threads call it and get the same result.
//
// Masses are much alike: a warp's values fall into few bins, and additions to one bin wait for each
// other. With kCopies of the histogram, neighbouring lanes add to different ones.
template <int kThreads, int kCopies = 1>
class SmallestSetSearch {
 public:
  // The copies of a bin side by side, in different banks.
  struct Shared {
    uint32_t sum_low[2048 * kCopies];
    uint32_t sum_high[2048 * kCopies];
    uint32_t count[2048 * kCopies];
    uint64_t warp_sums[kThreads / 32];
    uint32_t warp_counts[kThreads / 32];
    uint64_t total;
    int bin;  // where the prefix ends; -1 when all values together do not suffice
    uint64_t sum_above;
    int64_t count_above;
    int64_t index;
  };

  __device__ explicit SmallestSetSearch(Shared& shared) : shared_(shared) {}

  // The smallest set of values[0, n) that holds gamma of their sum and at least min_count of them;
  // all of them if no smaller set does. The values sum to less than 2^11.
  __device__ SmallestSet find(const float* values, int64_t n, float gamma, int64_t min_count) {
    // 31 bits of a non-negative float in digits of 11, 10 and 10.
    uint32_t prefix = 0;
    uint64_t target = 0;
    uint64_t sum_above = 0;
    int64_t count_above = 0;
#pragma unroll 1
    for (int level = 0; level < 3; ++level) {
      const int shift = 20 - 10 * level;
      const int num_bins = level == 0 ? 2048 : 1024;
      build_histogram(values, n, prefix, shift, num_bins, level == 0);
      if (level == 0) {
        add_up_total();
        target = static_cast<uint64_t>(
            ceil(static_cast<double>(gamma) * static_cast<double>(shared_.total)));
        if (target == 0 && min_count == 0) return {0xffffffffu, -1};
      }
      find_bin(num_bins, sum_above, count_above, target, min_count);
      if (shared_.bin < 0) return {0, INT64_MAX};
      prefix = prefix * num_bins + static_cast<uint32_t>(shared_.bin);
      sum_above = shared_.sum_above;
      count_above = shared_.count_above;
    }
    // `prefix` is now the whole value, and the last bin holds the values equal to it.
    const int64_t equals = bin_count(shared_.bin);
    const uint64_t value = to_fixed(__uint_as_float(prefix));
    int64_t needed = min_count - count_above;
    if (sum_above < target && value > 0) {
      const int64_t for_sum = static_cast<int64_t>((target - sum_above + value - 1) / value);
      needed = max(needed, for_sum);
    }
    if (needed >= equals) return {prefix, INT64_MAX};
    return {prefix, index_of_equal(values, n, prefix, needed)};
  }

 private:
  __device__ void build_histogram(const float* values, int64_t n, uint32_t prefix, int shift,
                                  int num_bins, bool first_level) {
    constexpr uint32_t kNone = 0xffffffffu;  // order_bits of no value
    __syncthreads();                         // readers of the histogram before are done
    for (int i = static_cast<int>(threadIdx.x); i < num_bins * kCopies; i += kThreads) {
      shared_.sum_low[i] = 0;
      shared_.sum_high[i] = 0;
      shared_.count[i] = 0;
    }
    __syncthreads();
    const int digit_bits = num_bins == 2048 ? 11 : 10;
    // Several loads in flight: one CTA alone has to draw on L2.
    constexpr int kLoads = 8;
    for (int64_t first = threadIdx.x; first < n; first += kLoads * kThreads) {
      uint32_t bits[kLoads];
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
        const int64_t i = first + j * kThreads;
        bits[j] = i < n ? order_bits(values[i]) : kNone;
      }
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
        if (bits[j] == kNone || (!first_level && (bits[j] >> shift >> digit_bits) != prefix)) {
          continue;
        }
        add_to_bin((bits[j] >> shift) & (num_bins - 1), to_fixed(__uint_as_float(bits[j])));
      }
    }
    __syncthreads();
  }

  // A 64-bit sum out of two native 32-bit additions: the carry follows from the old low word.
  __device__ __forceinline__ void add_to_bin(uint32_t bin, uint64_t value) {
    const uint32_t place = bin * kCopies + threadIdx.x % kCopies;
    const uint32_t low = static_cast<uint32_t>(value);
    const uint32_t old = atomicAdd(&shared_.sum_low[place], low);
    const uint32_t high = static_cast<uint32_t>(value >> 32) + (old + low < old ? 1u : 0u);
    if (high != 0) atomicAdd(&shared_.sum_high[place], high);
    atomicAdd(&shared_.count[place], 1u);
  }

  __device__ __forceinline__ uint64_t bin_sum(int bin) const {
    uint64_t sum = 0;
#pragma unroll
    for (int i = bin * kCopies; i < (bin + 1) * kCopies; ++i) {
      sum += static_cast<uint64_t>(shared_.sum_high[i]) << 32 | shared_.sum_low[i];
    }
    return sum;
  }

  __device__ __forceinline__ uint32_t bin_count(int bin) const {
    uint32_t count = 0;
#pragma unroll
    for (int i = bin * kCopies; i < (bin + 1) * kCopies; ++i) count += shared_.count[i];
    return count;
  }

  // Inclusive sums over the threads in order.
  __device__ __forceinline__ void scan(uint64_t& sum, uint32_t& count) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const uint64_t other_sum = __shfl_up_sync(0xffffffffu, sum, offset);
      const uint32_t other_count = __shfl_up_sync(0xffffffffu, count, offset);
      if (lane >= offset) {
        sum += other_sum;
        count += other_count;
      }
    }
    if (lane == 31) {
      shared_.warp_sums[warp] = sum;
      shared_.warp_counts[warp] = count;
    }
    __syncthreads();
    for (int w = 0; w < warp; ++w) {
      sum += shared_.warp_sums[w];
      count += shared_.warp_counts[w];
    }
    __syncthreads();  // the warps' sums may be overwritten
  }

  __device__ void add_up_total() {
    uint64_t sum = 0;
    uint32_t count = 0;
    for (int i = static_cast<int>(threadIdx.x); i < 2048; i += kThreads) sum += bin_sum(i);
    scan(sum, count);
    if (threadIdx.x == kThreads - 1) shared_.total = sum;
    __syncthreads();
  }

  // Finds the bin, counted from the top, with which sum and count first suffice.
  __device__ void find_bin(int num_bins, uint64_t sum_above, int64_t count_above, uint64_t target,
                           int64_t min_count) {
    if (threadIdx.x == 0) shared_.bin = -1;
    // Thread t takes the t-th run of bins from the top.
    const int run = num_bins / kThreads;
    const int top = num_bins - 1 - static_cast<int>(threadIdx.x) * run;
    uint64_t run_sum = 0;
    uint32_t run_count = 0;
    for (int i = 0; i < run; ++i) {
      run_sum += bin_sum(top - i);
      run_count += bin_count(top - i);
    }
    uint64_t sum = run_sum;
    uint32_t count = run_count;
    scan(sum, count);
    uint64_t above = sum_above + sum - run_sum;
    int64_t number_above = count_above + count - run_count;
    const auto suffices = [&] { return above >= target && number_above >= min_count; };
    if (!suffices()) {
      for (int i = 0; i < run; ++i) {
        const uint64_t before = above;
        const int64_t number_before = number_above;
        above += bin_sum(top - i);
        number_above += bin_count(top - i);
        if (suffices()) {
          shared_.bin = top - i;
          shared_.sum_above = before;
          shared_.count_above = number_before;
          break;
        }
      }
    }
    __syncthreads();
  }

  // Index of the k-th value, k >= 1, whose order_bits equal `bits`.
  __device__ int64_t index_of_equal(const float* values, int64_t n, uint32_t bits, int64_t k) {
    const int64_t run = (n + kThreads - 1) / kThreads;
    const int64_t begin = min(n, run * static_cast<int64_t>(threadIdx.x));
    const int64_t end = min(n, begin + run);
    uint32_t count = 0;
    for (int64_t i = begin; i < end; ++i) count += order_bits(values[i]) == bits ? 1u : 0u;
    const uint32_t own = count;
    uint64_t unused = 0;
    scan(unused, count);
    int64_t left = k - static_cast<int64_t>(count - own);
    if (left >= 1 && left <= static_cast<int64_t>(own)) {
      for (int64_t i = begin; i < end; ++i) {
        if (order_bits(values[i]) == bits && --left == 0) shared_.index = i;
      }
    }
    __syncthreads();
    return shared_.index;
  }

  Shared& shared_;
};

}  // namespace prefilld::kernels::cuda

#endif  // PREFILLD_KERNELS_CUDA_PATTERN_SMALLEST_SET_CUH_
