// Finds the smallest set of values whose sum reaches a share of the total, without sorting them.
//
// If the values were sorted from the largest down, with the lower index first among equals, the set
// would be a prefix. The value of its last member is found digit by digit (radix select): a
// histogram of the sums and counts of the values by their leading bits tells in which bin the
// prefix ends; the next histogram does the same for the values within that bin. This works because
// non-negative floats have the same order as their bit patterns.
//
// Sums are 64-bit fixed point with 52 fractional bits. They are exact for every value of at least
// 2^-28, off by at most 2^-53 for each smaller one, and the same in any order of addition. The set
// can differ from that of a sum in floating point only where the running sum passes the target by
// less than that sum's own rounding error.
#ifndef PREFILLD_KERNELS_CUDA_PATTERN_SMALLEST_SET_CUH_
#define PREFILLD_KERNELS_CUDA_PATTERN_SMALLEST_SET_CUH_

#include <climits>
#include <cstdint>

#include "kernels/cuda/device/arithmetic.cuh"
#include "kernels/cuda/device/cluster.cuh"

namespace prefilld::kernels::cuda {

// A value in fixed point with 52 fractional bits.
__device__ __forceinline__ uint64_t to_fixed(float value) {
  return __float2ull_rn(value * 0x1p52f);
}

// Maps values to unsigned integers of the same order. NaN and negative values become 0.
__device__ __forceinline__ uint32_t order_bits(float value) {
  return value > 0.0f ? __float_as_uint(value) : 0u;
}

struct SmallestSet {
  uint32_t last = 0;    // order_bits of the smallest member
  int last_index = -1;  // the highest index among the members that are equal to it

  __device__ __forceinline__ bool contains(float value, int index) const {
    const uint32_t bits = order_bits(value);
    return bits > last || (bits == last && index <= last_index);
  }
};

// A CTA's values. Its threads read them several times and can keep the first of them in shared
// memory. Each thread writes and reads its own ones, so that no barrier is needed.
template <int kThreads>
struct CachedValues {
  static constexpr int kLoads = 16;  // in flight at once, as few CTAs have to use all of L2's speed
  static constexpr int kTile = kLoads * kThreads;

  const float* values = nullptr;  // [n]
  int n = 0;
  float* cache = nullptr;  // [cached]
  int cached = 0;          // a multiple of kTile; may be more than n

  // The index of element j of this thread's part of the tile that begins at `tile`.
  static __device__ __forceinline__ int index(int tile, int j) {
    return tile + j * kThreads + static_cast<int>(threadIdx.x);
  }

  // Copies the first values into the cache.
  __device__ void fill_cache() const {
    for (int tile = 0; tile < min(cached, n); tile += kTile) {
      float part[kLoads];
      load_global(tile, part);
#pragma unroll
      for (int j = 0; j < kLoads; ++j) cache[index(tile, j)] = part[j];
    }
  }

  // Loads this thread's part of a tile; elements beyond n are 0.
  __device__ __forceinline__ void load(int tile, float (&part)[kLoads]) const {
    if (tile >= cached) return load_global(tile, part);
#pragma unroll
    for (int j = 0; j < kLoads; ++j) part[j] = cache[index(tile, j)];
  }

 private:
  __device__ __forceinline__ void load_global(int tile, float (&part)[kLoads]) const {
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      part[j] = index(tile, j) < n ? values[index(tile, j)] : 0.0f;
    }
  }
};

// The search. A cluster of CTAs does it together, each of which has a share of the values, in order
// of rank; or a single CTA. All threads of the cluster call it.
//
// Digits have eight bits, so that the first one is a float's exponent. Within a bin, fixed-point
// values are then integers of 24 bits with a common factor, and two 32-bit additions in shared
// memory add a value to a bin and count it. Masses are much alike and fall into few bins, and
// additions to one bin wait for each other. So there are kCopies of the histogram: neighbouring
// lanes add to different ones, which lie in different banks.
template <int kThreads, int kCopies>
class SmallestSetSearch {
 public:
  using Values = CachedValues<kThreads>;
  static constexpr int kBins = 256;

  struct Shared {
    // The copies of a bin lie side by side. A value's lower kLowBits are added up in the lower part
    // of `low`, whose upper part counts the values; its upper bits are added up in `high`.
    uint32_t low[kBins * kCopies];
    uint32_t high[kBins * kCopies];
    // The sums and counts of this CTA's values by bins, which the whole cluster reads. There are
    // two of each: one level's may still be read while the next level's are written.
    uint64_t sums[2][kBins];
    uint32_t counts[2][kBins];
    uint64_t warp_sums[kThreads / 32];
    uint32_t warp_counts[kThreads / 32];
    int bin;  // the bin in which the prefix ends; -1 when all values together do not suffice
    uint64_t sum_above;
    uint32_t count_above;
    int index;
  };

  __device__ explicit SmallestSetSearch(Shared& shared) : shared_(shared) {}

  // Finds the smallest set of the cluster's values that holds gamma of their sum and at least
  // min_count of them; all of them if no smaller set does. `values` are those of this CTA, and the
  // result is in terms of their indices. All values of the cluster are fewer than 2^31 and sum to
  // less than 2^11.
  //
  // The caller must call cluster_sync() before a CTA ends: others may still read its shared memory.
  __device__ SmallestSet find(const Values& values, float gamma, int64_t min_count) {
    const auto least_count = static_cast<uint32_t>(min(min_count, int64_t{UINT_MAX}));
    for (int i = static_cast<int>(threadIdx.x); i < kBins * kCopies; i += kThreads) {
      shared_.low[i] = 0;
      shared_.high[i] = 0;
    }
    __syncthreads();
    uint32_t prefix = 0;  // the digits known of the last member's key
    uint64_t target = 0;
    uint64_t sum_above = 0;
    uint32_t count_above = 0;
#pragma unroll 1
    for (int level = 0; level < kLevels; ++level) {
      build_histogram(values, prefix, level);
      device::cluster_sync();
      const BinRun run = add_up_to_bin(level);
      if (level == 0) {
        target = static_cast<uint64_t>(
            ceil(static_cast<double>(gamma) * static_cast<double>(run.total)));
        if (target == 0 && least_count == 0) return {UINT_MAX, -1};
      }
      find_bin(run, sum_above, count_above, target, least_count);
      if (shared_.bin < 0) return {0, INT_MAX};
      prefix = prefix << 8 | static_cast<uint32_t>(shared_.bin);
      sum_above = shared_.sum_above;
      count_above = shared_.count_above;
    }
    // `prefix` is now the whole key, and the last bin holds the values equal to it.
    const uint32_t last = prefix >> 1;
    const uint64_t value = to_fixed(__uint_as_float(last));
    int64_t needed = static_cast<int64_t>(least_count) - count_above;
    if (sum_above < target && value > 0) {
      const int64_t for_sum = static_cast<int64_t>((target - sum_above + value - 1) / value);
      needed = max(needed, for_sum);
    }
    const uint32_t* own_equals = &shared_.counts[(kLevels - 1) % 2][shared_.bin];
    for (int rank = 0; rank < device::cluster_rank(); ++rank) {
      needed -= *device::cluster_shared(own_equals, rank);
    }
    if (needed <= 0) return {last, -1};
    if (needed >= *own_equals) return {last, INT_MAX};
    return {last, index_of_equal(values, last, static_cast<int>(needed))};
  }

 private:
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kLevels = 4;
  static constexpr int kThreadsPerBin = kThreads / kBins;
  static_assert(kThreads % kBins == 0 && kCopies % kThreadsPerBin == 0,
                "the threads divide the bins' copies among them");
  static constexpr int kLowBits = 5;
  static constexpr int kCountShift = 18;
  // The number of values of 24 bits that a copy can take before it has to be emptied.
  static constexpr int kCopyValues = 1 << 13;
  static_assert(((1ull << kLowBits) - 1) * kCopyValues < 1ull << kCountShift &&
                    uint64_t{kCopyValues} << kCountShift < 1ull << 32 &&
                    ((1ull << (24 - kLowBits)) - 1) * kCopyValues < 1ull << 32,
                "sums and count have room");

  // The values of this thread's bin, of the bins from the top down to it, and of all bins.
  struct BinRun {
    uint64_t bin_sum;
    uint32_t bin_count;
    uint64_t sum;
    uint32_t count;
    uint64_t total;
  };

  // Doubles a float's order bits. They are then four digits of eight bits, the first of which is
  // the exponent.
  static __device__ __forceinline__ uint32_t key_of(uint32_t bits) { return bits << 1; }
  // From this exponent on, fixed-point values have a common factor: 2^(exponent - kUnitExponent).
  static constexpr uint32_t kUnitExponent = 127 - 52 + 23;

  // The same as to_fixed(), divided by that factor.
  static __device__ __forceinline__ uint32_t integer_of(uint32_t bits) {
    return bits >> 23 >= kUnitExponent ? (bits & 0x7fffff) | 0x800000
                                       : __float2uint_rn(__uint_as_float(bits) * 0x1p52f);
  }

  // Adds up this CTA's values whose leading digits are `prefix`, by their next digit.
  __device__ void build_histogram(const Values& values, uint32_t prefix, int level) {
    const int bin = static_cast<int>(threadIdx.x) / kThreadsPerBin;
    uint64_t sum = 0;
    uint32_t count = 0;
    constexpr int kRun = kCopyValues * kCopies;
    static_assert(kRun % Values::kTile == 0, "every copy gets the same number of values");
    for (int begin = 0; begin < values.n; begin += kRun) {
      for (int tile = begin; tile < min(values.n, begin + kRun); tile += Values::kTile) {
        add_tile(values, tile, prefix, 24 - 8 * level);
      }
      __syncthreads();
      empty_bin(bin, sum, count);
      __syncthreads();
    }
#pragma unroll
    for (int offset = 1; offset < kThreadsPerBin; offset *= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, offset);
      count += __shfl_xor_sync(0xffffffffu, count, offset);
    }
    if (threadIdx.x % kThreadsPerBin != 0) return;
    const uint32_t exponent = level == 0 ? static_cast<uint32_t>(bin) : prefix >> 8 * (level - 1);
    shared_.sums[level % 2][bin] = sum << (max(exponent, kUnitExponent) - kUnitExponent);
    shared_.counts[level % 2][bin] = count;
  }

  __device__ __forceinline__ void add_tile(const Values& values, int tile, uint32_t prefix,
                                           int shift) {
    float part[Values::kLoads];
    values.load(tile, part);
#pragma unroll
    for (int j = 0; j < Values::kLoads; ++j) {
      const uint32_t bits = order_bits(part[j]);
      const uint32_t digits = key_of(bits) >> shift;
      if (Values::index(tile, j) >= values.n || digits >> 8 != prefix) continue;
      const uint32_t place = digits % kBins * kCopies + threadIdx.x % kCopies;
      const uint32_t integer = integer_of(bits);
      atomicAdd(&shared_.low[place], 1u << kCountShift | integer % (1u << kLowBits));
      atomicAdd(&shared_.high[place], integer >> kLowBits);
    }
  }

  // Moves this thread's part of a bin's copies to its sums. Lanes start at different copies, so
  // that they read different banks.
  __device__ __forceinline__ void empty_bin(int bin, uint64_t& sum, uint32_t& count) {
    const int part = static_cast<int>(threadIdx.x) % kThreadsPerBin;
#pragma unroll
    for (int i = 0; i < kCopies / kThreadsPerBin; ++i) {
      const int place = bin * kCopies + ((bin + i) * kThreadsPerBin + part) % kCopies;
      const uint32_t low = shared_.low[place];
      sum += (static_cast<uint64_t>(shared_.high[place]) << kLowBits) + low % (1u << kCountShift);
      count += low >> kCountShift;
      shared_.low[place] = 0;
      shared_.high[place] = 0;
    }
  }

  // Adds up the bins of all CTAs. Thread t < kBins takes the t-th bin from the top; the other
  // threads get the total alone.
  __device__ BinRun add_up_to_bin(int level) {
    const int thread = static_cast<int>(threadIdx.x);
    const int lane = thread % 32;
    BinRun run{};
    if (thread < kBins) {
      for (int rank = 0; rank < device::cluster_size(); ++rank) {
        const int bin = kBins - 1 - thread;
        run.bin_sum += *device::cluster_shared(&shared_.sums[level % 2][bin], rank);
        run.bin_count += *device::cluster_shared(&shared_.counts[level % 2][bin], rank);
      }
      run.sum = run.bin_sum;
      run.count = run.bin_count;
#pragma unroll
      for (int offset = 1; offset < 32; offset *= 2) {
        const uint64_t other_sum = __shfl_up_sync(0xffffffffu, run.sum, offset);
        const uint32_t other_count = __shfl_up_sync(0xffffffffu, run.count, offset);
        if (lane >= offset) {
          run.sum += other_sum;
          run.count += other_count;
        }
      }
      if (lane == 31) {
        shared_.warp_sums[thread / 32] = run.sum;
        shared_.warp_counts[thread / 32] = run.count;
      }
    }
    if (thread == 0) shared_.bin = -1;
    __syncthreads();
#pragma unroll
    for (int warp = 0; warp < kBins / 32; ++warp) {
      run.total += shared_.warp_sums[warp];
      if (warp < thread / 32) {
        run.sum += shared_.warp_sums[warp];
        run.count += shared_.warp_counts[warp];
      }
    }
    return run;
  }

  // Finds the first bin from the top with which sum and count suffice.
  __device__ void find_bin(const BinRun& run, uint64_t sum_above, uint32_t count_above,
                           uint64_t target, uint32_t least_count) {
    const uint64_t sum = sum_above + run.sum;
    const uint32_t count = count_above + run.count;
    const auto suffices = [&](uint64_t s, uint32_t c) { return s >= target && c >= least_count; };
    if (threadIdx.x < kBins && suffices(sum, count) &&
        !suffices(sum - run.bin_sum, count - run.bin_count)) {
      shared_.bin = kBins - 1 - static_cast<int>(threadIdx.x);
      shared_.sum_above = sum - run.bin_sum;
      shared_.count_above = count - run.bin_count;
    }
    __syncthreads();
  }

  // Returns the index of the k-th value, k >= 1, whose order_bits equal `bits`; there are at least
  // k. It is needed only where the set ends amid equal values.
  __device__ int index_of_equal(const Values& all, uint32_t bits, int k) {
    const float* values = all.values;
    const int n = all.n;
    const int warp = static_cast<int>(threadIdx.x) / 32;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int run = (n + kThreads - 1) / kThreads * 32;  // values of one warp
    const int begin = min(n, warp * run);
    const int end = min(n, begin + run);
    int count = 0;
#pragma unroll 8
    for (int i = begin + lane; i < end; i += 32) count += order_bits(values[i]) == bits ? 1 : 0;
    count = device::warp_sum(count);
    if (lane == 0) shared_.warp_counts[warp] = static_cast<uint32_t>(count);
    __syncthreads();
    for (int w = 0; w < warp; ++w) k -= static_cast<int>(shared_.warp_counts[w]);
    for (int first = begin; k >= 1 && k <= count && first < end; first += 32) {
      const int i = first + lane;
      const bool equal = i < end && order_bits(values[i]) == bits;
      const uint32_t lanes = __ballot_sync(0xffffffffu, equal);
      if (equal && __popc(lanes & ((2u << lane) - 1)) == k) shared_.index = i;
      const int found = __popc(lanes);
      if (found >= k) break;
      k -= found;
      count -= found;
    }
    __syncthreads();
    return shared_.index;
  }

  Shared& shared_;
};

}  // namespace prefilld::kernels::cuda

#endif  // PREFILLD_KERNELS_CUDA_PATTERN_SMALLEST_SET_CUH_
