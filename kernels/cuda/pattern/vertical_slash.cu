// Vertical-slash sets, and patterns from them.
//
// Arithmetic, at 28 heads and 128k keys: there are 56 sets of 131072 masses, 29 MB in L2, which
// take 5 us to read. A cluster of two CTAs finds a set, on 112 of 132 SMs, and goes through its
// masses five times; half of them stay in shared memory. Every mass is added once to a histogram:
// 4096 atomics of a warp on shared memory per CTA, which take 5 to 10 us without conflicts.
#include <algorithm>
#include <climits>
#include <cstdint>

#include "kernels/attention.h"
#include "kernels/cuda/device/cluster.cuh"
#include "kernels/cuda/kernel_path.h"
#include "kernels/cuda/pattern.h"
#include "kernels/cuda/pattern/plan.h"
#include "kernels/cuda/pattern/smallest_set.cuh"

namespace prefilld::kernels::cuda {
namespace {

constexpr int kSelectThreads = 1024;
using Search = SmallestSetSearch<kSelectThreads, /*kCopies=*/32>;
constexpr int kExpandThreads = 256;
// Indices are 32 bits wide, and may pass the end by a few times the number of a CTA's threads.
constexpr int64_t kMaxKeys = int64_t{1} << 30;

// Sets the bits of the blocks that have a column, or a diagonal, in the set. `mass` are those of
// the columns, or diagonals, from `first` on.
__device__ void choose_blocks(const VerticalSlashParams& params, bool diagonals,
                              const Search::Values& mass, int first, const SmallestSet& set,
                              int num_blocks, uint32_t* words) {
  const auto choose = [&](int block) { atomicOr(&words[block / 32], 1u << (block % 32)); };
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  // The block of the thread's next index, and its place therein. Only the first one is divided; the
  // following ones are counted on.
  int block = (first + thread) / params.block_tokens;
  int rest = (first + thread) % params.block_tokens;
  const int step_blocks = kSelectThreads / params.block_tokens;
  const int step_rest = kSelectThreads % params.block_tokens;
  for (int tile = 0; tile < mass.n; tile += Search::Values::kTile) {
    float part[Search::Values::kLoads];
    mass.load(tile, part);
#pragma unroll
    for (int j = 0; j < Search::Values::kLoads; ++j) {
      const int i = Search::Values::index(tile, j);
      const bool chosen = i < mass.n && set.contains(part[j], i);
      // Lanes have consecutive indices. Among the lanes of one block the first that is chosen sets
      // the bit, since atomics on one word wait for each other.
      const uint32_t below_in_block = (1u << lane) - (1u << (lane - min(lane, rest)));
      if ((__ballot_sync(~0u, chosen) & below_in_block) == 0 && chosen) choose(block);
      if (diagonals) {
        // A diagonal between two block diagonals crosses both.
        const bool crosses = chosen && rest != 0 && block + 1 < num_blocks;
        if ((__ballot_sync(~0u, crosses) & below_in_block) == 0 && crosses) choose(block + 1);
      }
      block += step_blocks;
      rest += step_rest;
      if (rest >= params.block_tokens) {
        rest -= params.block_tokens;
        ++block;
      }
    }
  }
}

// Finds the sets and rounds them to blocks. A cluster takes one set; grid: (heads * cluster size,
// columns or diagonals). Dynamic shared memory holds the search's, `cached` masses, and the words
// of a row.
__global__ void __launch_bounds__(kSelectThreads)
    vertical_slash_kernel(VerticalSlashParams params, int num_blocks, int cached) {
  extern __shared__ __align__(16) unsigned char memory[];
  auto& shared = *reinterpret_cast<Search::Shared*>(memory);
  auto* cache = reinterpret_cast<float*>(memory + sizeof(Search::Shared));
  auto* words = reinterpret_cast<uint32_t*>(cache + cached);
  const int num_words = (num_blocks + 31) / 32;
  const int size = device::cluster_size();
  const int rank = device::cluster_rank();
  const bool diagonals = blockIdx.y == 1;
  const int64_t head = static_cast<int>(blockIdx.x) / size;
  const int num_keys = static_cast<int>(params.num_keys);
  const int share = (num_keys + 32 * size - 1) / (32 * size) * 32;
  const int first = min(rank * share, num_keys);
  const Search::Values mass{
      .values = (diagonals ? params.slash : params.vertical) + head * num_keys + first,
      .n = min(share, num_keys - first),
      .cache = cache,
      .cached = cached};
  mass.fill_cache();

  for (int w = static_cast<int>(threadIdx.x); w < num_words; w += kSelectThreads) {
    words[w] = w == 0 ? 1u : 0u;  // column 0, or the main diagonal
  }
  const SmallestSet set = Search(shared).find(mass, params.gamma, params.min_budget_tokens);
  choose_blocks(params, diagonals, mass, first, set, num_blocks, words);
  device::cluster_sync();
  uint32_t* destination = (diagonals ? params.diagonals : params.columns) + head * num_words;
  for (int w = rank * kSelectThreads + static_cast<int>(threadIdx.x); w < num_words;
       w += size * kSelectThreads) {
    uint32_t bits = 0;
    for (int other = 0; other < size; ++other) bits |= *device::cluster_shared(words + w, other);
    destination[w] = bits;
  }
  device::cluster_sync();  // this CTA's shared memory has been read
}

// Returns bits [first, first + 32) of a bitmap. Bits below 0 and from 32 * num_words on are 0.
__device__ __forceinline__ uint32_t bits_from(const uint32_t* words, int num_words, int first) {
  const int word = first >> 5;  // rounds down also below 0
  const uint32_t low = word >= 0 && word < num_words ? words[word] : 0;
  const uint32_t high = word + 1 >= 0 && word + 1 < num_words ? words[word + 1] : 0;
  return __funnelshift_r(low, high, first & 31);
}

// Writes patterns from sets, one thread per word of a head's pattern. grid: (words, heads).
__global__ void __launch_bounds__(kExpandThreads)
    expand_vertical_slash_kernel(ExpandVerticalSlashParams params) {
  const int num_words = static_cast<int>((params.num_key_blocks + 31) / 32);
  const int64_t head = blockIdx.y;
  const uint32_t* columns = params.columns + head * num_words;
  const uint32_t* diagonals = params.diagonals + head * num_words;
  const int i = static_cast<int>(blockIdx.x * kExpandThreads + threadIdx.x);
  uint32_t bits = 0;
  if (i < params.num_query_blocks * num_words) {
    const int word = i % num_words;
    const int row =
        static_cast<int>(params.num_key_blocks - params.num_query_blocks) + i / num_words;
    // Key block c = 32 * word + b is on diagonal row - c, so the diagonals come in reverse order.
    bits = columns[word] | __brev(bits_from(diagonals, num_words, row - 32 * word - 31));
    if (word == row / 32) {
      bits &= (2u << (row % 32)) - 1;
    } else if (word > row / 32) {
      bits = 0;
    }
    params.pattern[head * params.num_query_blocks * num_words + i] = bits;
  }
  if (params.blocks == nullptr) return;
  const int warp_blocks = __reduce_add_sync(0xffffffffu, __popc(bits));
  if (threadIdx.x % 32 == 0) {
    atomicAdd(reinterpret_cast<unsigned long long*>(params.blocks + head),
              static_cast<unsigned long long>(warp_blocks));
  }
}

struct SetLaunch {
  int cluster_size = 1;
  int cached = 0;
  int shared_bytes = 0;
};

// A SetLaunch in the form that the runtime takes. It can not be copied, since it points into
// itself.
class LaunchConfig {
 public:
  LaunchConfig(const SetLaunch& launch, int num_heads, cudaStream_t stream) {
    cluster_.id = cudaLaunchAttributeClusterDimension;
    cluster_.val.clusterDim = {static_cast<unsigned>(launch.cluster_size), 1, 1};
    config_.gridDim = dim3(num_heads * launch.cluster_size, 2);
    config_.blockDim = kSelectThreads;
    config_.dynamicSmemBytes = static_cast<size_t>(launch.shared_bytes);
    config_.stream = stream;
    config_.attrs = &cluster_;
    config_.numAttrs = launch.cluster_size > 1 ? 1 : 0;
  }
  LaunchConfig(const LaunchConfig&) = delete;
  LaunchConfig& operator=(const LaunchConfig&) = delete;

  const cudaLaunchConfig_t* get() const { return &config_; }

 private:
  cudaLaunchAttribute cluster_{};
  cudaLaunchConfig_t config_{};
};

// Chooses the cluster size, and how many masses a CTA caches.
// - The cluster size is 1 where the driver runs the kernel's sm_80 code, which knows no clusters.
//   Elsewhere it is what VerticalSlashClusterSize wants, halved until one cluster fits the GPU: the
//   CTAs of a cluster have to find room in one part of it.
// - A CTA caches all of its masses, or as many as fit into shared memory.
cudaError_t PlanSetLaunch(const VerticalSlashParams& params, int num_blocks, SetLaunch* launch) {
  GpuTraits gpu;
  cudaFuncAttributes kernel{};
  cudaError_t error = CurrentGpu(&gpu);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&kernel, vertical_slash_kernel);
  if (error != cudaSuccess) return error;
  if (kernel.ptxVersion >= 90) {
    launch->cluster_size = VerticalSlashClusterSize(params.num_heads, params.num_keys, gpu.num_sms);
  }
  constexpr int kTile = Search::Values::kTile;
  constexpr int kTileBytes = kTile * static_cast<int>(sizeof(float));
  const auto fixed_bytes =
      static_cast<int>(sizeof(Search::Shared) + PatternWords(num_blocks) * sizeof(uint32_t));
  for (;; launch->cluster_size /= 2) {
    const auto tiles =
        static_cast<int>(CeilDiv(params.num_keys, int64_t{launch->cluster_size} * kTile));
    const int cached_tiles =
        std::clamp((gpu.max_shared_bytes - fixed_bytes) / kTileBytes, 0, tiles);
    launch->cached = cached_tiles * kTile;
    launch->shared_bytes = fixed_bytes + launch->cached * static_cast<int>(sizeof(float));
    error = cudaFuncSetAttribute(vertical_slash_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 launch->shared_bytes);
    if (error != cudaSuccess || launch->cluster_size == 1) return error;
    int clusters_at_once = 0;
    const LaunchConfig config(*launch, params.num_heads, /*stream=*/nullptr);
    error = cudaOccupancyMaxActiveClusters(&clusters_at_once, vertical_slash_kernel, config.get());
    if (error != cudaSuccess || clusters_at_once > 0) return error;
  }
}

}  // namespace

cudaError_t LaunchVerticalSlash(const VerticalSlashParams& params, cudaStream_t stream) {
  if (params.num_heads <= 0 || params.num_keys <= 0 || params.num_keys > kMaxKeys ||
      params.block_tokens <= 0) {
    return cudaErrorInvalidValue;
  }
  const auto num_blocks = static_cast<int>(CeilDiv(params.num_keys, params.block_tokens));
  SetLaunch launch;
  if (cudaError_t error = PlanSetLaunch(params, num_blocks, &launch); error != cudaSuccess) {
    return error;
  }
  const LaunchConfig config(launch, params.num_heads, stream);
  return cudaLaunchKernelEx(config.get(), vertical_slash_kernel, params, num_blocks, launch.cached);
}

cudaError_t LaunchExpandVerticalSlash(const ExpandVerticalSlashParams& params,
                                      cudaStream_t stream) {
  const int64_t words = params.num_query_blocks * PatternWords(params.num_key_blocks);
  if (words <= 0 || words > INT_MAX - kExpandThreads || params.num_heads <= 0) {
    return cudaErrorInvalidValue;
  }
  if (params.blocks != nullptr) {
    const cudaError_t error = cudaMemsetAsync(
        params.blocks, 0, static_cast<size_t>(params.num_heads) * sizeof(*params.blocks), stream);
    if (error != cudaSuccess) return error;
  }
  const dim3 grid(static_cast<unsigned>(CeilDiv(words, kExpandThreads)),
                  static_cast<unsigned>(params.num_heads));
  expand_vertical_slash_kernel<<<grid, kExpandThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace prefilld::kernels::cuda
