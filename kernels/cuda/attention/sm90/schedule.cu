#include "kernels/cuda/attention/sm90/schedule.h"

#include <cub/device/device_radix_sort.cuh>

#include "kernels/cuda/attention/sm90/config.h"

namespace prefilld::kernels::cuda::sm90 {
namespace {

constexpr int kCostBits = 16;  // up to 65535 key blocks: 8M tokens
constexpr int kKvHeadBits = 10;
constexpr int kKeyBits = 1 + kKvHeadBits + kCostBits;
constexpr size_t kAlign = 256;

size_t Aligned(size_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

size_t SortBytes(int num_tiles) {
  size_t bytes = 0;
  cub::DeviceRadixSort::SortPairs(nullptr, bytes, static_cast<const uint32_t*>(nullptr),
                                  static_cast<uint32_t*>(nullptr),
                                  static_cast<const uint32_t*>(nullptr),
                                  static_cast<uint32_t*>(nullptr), num_tiles, 0, kKeyBits);
  return bytes;
}

// Writes each tile's sort key and id, and zeros for the block mass that the consumers will add to.
// One warp takes one tile.
__global__ void prepare_tiles_kernel(const __grid_constant__ Launch launch, uint32_t* keys,
                                     uint32_t* ids) {
  const int tile = (blockIdx.x * blockDim.x + threadIdx.x) / 32;
  const int lane = threadIdx.x % 32;
  if (tile >= launch.num_tiles) return;
  const int row = tile % launch.num_query_blocks;
  const HeadTask& task = launch.tasks[tile / launch.num_query_blocks];
  if (task.block_mass != nullptr) {
    float* mass = task.block_mass + static_cast<int64_t>(row) * launch.row_key_blocks;
    for (int c = lane; c < launch.row_key_blocks; c += 32) mass[c] = 0.0f;
  }
  int cost = launch.first_query_block + row + 1;
  if (task.pattern != nullptr) {
    const uint32_t* words = task.pattern + static_cast<int64_t>(row) * launch.pattern_words;
    int count = 0;
    for (int w = lane; w < launch.pattern_words; w += 32) count += __popc(words[w]);
    cost = __reduce_add_sync(~0u, count);
  }
  if (lane == 0) {
    const uint32_t sparse = task.pattern != nullptr;
    const uint32_t kv_head = task.head / launch.group;
    keys[tile] = (sparse << (kKvHeadBits + kCostBits)) | (kv_head << kCostBits) |
                 ((1u << kCostBits) - 1 - cost);
    ids[tile] = tile;
  }
}

}  // namespace

size_t OrderScratchBytes(int num_tiles) {
  return 4 * Aligned(num_tiles * sizeof(uint32_t)) + Aligned(SortBytes(num_tiles));
}

cudaError_t OrderTiles(Launch& launch, void* scratch, cudaStream_t stream) {
  const size_t array = Aligned(launch.num_tiles * sizeof(uint32_t));
  auto* base = static_cast<unsigned char*>(scratch);
  auto* keys = reinterpret_cast<uint32_t*>(base);
  auto* ids = reinterpret_cast<uint32_t*>(base + array);
  auto* sorted_keys = reinterpret_cast<uint32_t*>(base + 2 * array);
  auto* sorted_ids = reinterpret_cast<uint32_t*>(base + 3 * array);
  launch.order = sorted_ids;

  constexpr int kThreads = 256;
  const int grid = (launch.num_tiles + kThreads / 32 - 1) / (kThreads / 32);
  prepare_tiles_kernel<<<grid, kThreads, 0, stream>>>(launch, keys, ids);
  if (cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  size_t sort_bytes = SortBytes(launch.num_tiles);
  return cub::DeviceRadixSort::SortPairs(base + 4 * array, sort_bytes, keys, sorted_keys, ids,
                                         sorted_ids, launch.num_tiles, 0, kKeyBits, stream);
}

}  // namespace prefilld::kernels::cuda::sm90
