#include "kernels/cuda/attention/sm90/forward.h"

#include <algorithm>
#include <cmath>

#include "kernels/cuda/attention/plan.h"
#include "kernels/cuda/attention/sm90/config.h"
#include "kernels/cuda/attention/sm90/instances.h"
#include "kernels/cuda/attention/sm90/schedule.h"
#include "kernels/cuda/tensor_map.h"

namespace prefilld::kernels::cuda::sm90 {
namespace {

constexpr size_t kCounterBytes = 256;

bool AnyBlockMass(const AttentionParams& p) {
  return std::any_of(p.work, p.work + p.num_work,
                     [](const HeadWork& w) { return w.block_mass != nullptr; });
}

cudaError_t MakeMaps(const AttentionParams& p, TensorMaps* maps) {
  const uint64_t d = p.head_dim;
  const uint64_t heads = p.num_heads;
  const auto queries = [&](const void* data, int64_t num_queries, uint32_t rows) {
    return TensorTiles{.data = data,
                       .dims = {d, heads, static_cast<uint64_t>(num_queries)},
                       .strides = {d, d * heads},
                       .box1 = 1,
                       .box2 = rows};
  };
  const auto keys = [&](const void* data) {
    return TensorTiles{
        .data = data,
        .dims = {d, static_cast<uint64_t>(p.num_keys), static_cast<uint64_t>(p.num_kv_heads)},
        .strides = {d, static_cast<uint64_t>(p.kv_head_stride)},
        .box1 = kTile,
        .box2 = 1};
  };
  // A consumer stores its own half of a tile. A first tile that begins within a block is shorter:
  // it has its own map, which ends with it, so that the copy engine drops the rest.
  const int64_t first_rows =
      std::min<int64_t>(kTile - (p.num_keys - p.num_queries) % kTile, p.num_queries);
  cudaError_t error = MakeTensorMap(queries(p.q, p.num_queries, kTile), &maps->q);
  if (error == cudaSuccess) {
    error = MakeTensorMap(queries(p.out, p.num_queries, kTile / kConsumers), &maps->out);
  }
  if (error == cudaSuccess) {
    error = MakeTensorMap(queries(p.out, first_rows, kTile / kConsumers), &maps->first_out);
  }
  if (error == cudaSuccess) error = MakeTensorMap(keys(p.k), &maps->k);
  if (error == cudaSuccess) error = MakeTensorMap(keys(p.v), &maps->v);
  return error;
}

// Launches the kernel for at most kMaxHeadsPerLaunch heads.
cudaError_t LaunchPart(const AttentionParams& p, const HeadWork* work, int num_work,
                       const TensorMaps& maps, void* scratch, int num_sms, cudaStream_t stream) {
  Launch launch{};
  bool block_mass = false;
  for (int i = 0; i < num_work; ++i) {
    launch.tasks[i] = {work[i].pattern, work[i].last_row, work[i].block_mass, work[i].head};
    block_mass |= work[i].block_mass != nullptr;
  }
  launch.num_query_blocks = static_cast<int>(NumQueryBlocks(p));
  launch.row_key_blocks = static_cast<int>(RowKeyBlocks(p));
  launch.num_tiles = num_work * launch.num_query_blocks;
  const int first_query = static_cast<int>(p.num_keys - p.num_queries);
  launch.first_query_block = first_query / kTile;
  launch.skipped_queries = first_query % kTile;
  launch.num_queries = static_cast<int>(p.num_queries);
  launch.group = p.num_heads / p.num_kv_heads;
  launch.pattern_words = static_cast<int>(PatternWords(launch.row_key_blocks));
  launch.scale_log2 = p.scale * static_cast<float>(M_LOG2E);

  auto* base = static_cast<unsigned char*>(scratch);
  launch.next_tile = reinterpret_cast<int*>(base);
  void* order_scratch = base + kCounterBytes;
  launch.row_weights =
      reinterpret_cast<float*>(base + kCounterBytes + OrderScratchBytes(launch.num_tiles));
  // The few tiles of a short prompt need no order, which would cost three more kernels. Block mass
  // needs it, because it is set to zero there.
  if (block_mass || launch.num_tiles > num_sms) {
    cudaError_t error = cudaMemsetAsync(launch.next_tile, 0, sizeof(int), stream);
    if (error == cudaSuccess) error = OrderTiles(launch, order_scratch, stream);
    if (error != cudaSuccess) return error;
  }
  const int grid = std::min(num_sms, launch.num_tiles);
  if (p.head_dim == 64) {
    return block_mass ? RunHeadDim64BlockMass(launch, maps, grid, stream)
                      : RunHeadDim64(launch, maps, grid, stream);
  }
  return block_mass ? RunHeadDim128BlockMass(launch, maps, grid, stream)
                    : RunHeadDim128(launch, maps, grid, stream);
}

}  // namespace

bool Supports(const AttentionParams& p) {
  return (p.head_dim == 64 || p.head_dim == 128) && p.block_tokens == kTile &&
         p.kv_head_stride % 8 == 0;
}

size_t AttentionScratchBytes(const AttentionParams& p, int num_sms) {
  size_t bytes = kCounterBytes + OrderScratchBytes(std::min(p.num_work, kMaxHeadsPerLaunch) *
                                                   static_cast<int>(NumQueryBlocks(p)));
  if (AnyBlockMass(p)) {
    bytes += static_cast<size_t>(num_sms) * RowKeyBlocks(p) * kTile * sizeof(float);
  }
  return bytes;
}

cudaError_t LaunchAttention(const AttentionParams& p, void* scratch, int num_sms,
                            cudaStream_t stream) {
  TensorMaps maps;
  if (cudaError_t error = MakeMaps(p, &maps); error != cudaSuccess) return error;
  for (int first = 0; first < p.num_work; first += kMaxHeadsPerLaunch) {
    const int count = std::min(kMaxHeadsPerLaunch, p.num_work - first);
    if (cudaError_t error = LaunchPart(p, p.work + first, count, maps, scratch, num_sms, stream);
        error != cudaSuccess) {
      return error;
    }
  }
  return cudaSuccess;
}

}  // namespace prefilld::kernels::cuda::sm90
