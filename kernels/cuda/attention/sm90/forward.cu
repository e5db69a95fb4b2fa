#include "kernels/cuda/attention/sm90/forward.h"

#include <algorithm>

#include "kernels/cuda/attention/sm90/config.h"
#include "kernels/cuda/attention/sm90/instances.h"
#include "kernels/cuda/attention/sm90/schedule.h"

namespace prefilld::kernels::cuda::sm90 {
namespace {

constexpr size_t kCounterBytes = 256;

int NumQueryBlocks(const AttentionParams& p) {
  return static_cast<int>(CeilDiv(p.num_keys, kTile) - (p.num_keys - p.num_queries) / kTile);
}

bool AnyBlockMass(const AttentionParams& p) {
  return std::any_of(p.work, p.work + p.num_work,
                     [](const HeadWork& w) { return w.block_mass != nullptr; });
}

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// Found at run time, so that the program links and starts without a driver.
cudaError_t FindEncodeTiled(EncodeTiled* encode) {
  static EncodeTiled found = nullptr;
  if (found == nullptr) {
    void* symbol = nullptr;
    cudaDriverEntryPointQueryResult result;
    cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &symbol, 12000,
                                                         cudaEnableDefault, &result);
    if (error != cudaSuccess) return error;
    if (result != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
    found = reinterpret_cast<EncodeTiled>(symbol);
  }
  *encode = found;
  return cudaSuccess;
}

// A bf16 tensor [dim2, dim1, dim0] of which boxes [box2, box1, 64] are copied.
cudaError_t MakeMap(EncodeTiled encode, CUtensorMap* map, const void* data, uint64_t dim0,
                    uint64_t dim1, uint64_t dim2, uint64_t stride1, uint64_t stride2, uint32_t box1,
                    uint32_t box2) {
  const cuuint64_t dims[3] = {dim0, dim1, dim2};
  const cuuint64_t strides[2] = {stride1 * 2, stride2 * 2};  // bytes
  const cuuint32_t box[3] = {kChunk, box1, box2};
  const cuuint32_t element_strides[3] = {1, 1, 1};
  const CUresult result =
      encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, const_cast<void*>(data), dims, strides, box,
             element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t MakeMaps(const AttentionParams& p, TensorMaps* maps) {
  EncodeTiled encode = nullptr;
  if (cudaError_t error = FindEncodeTiled(&encode); error != cudaSuccess) return error;
  const uint64_t d = p.head_dim;
  cudaError_t error =
      MakeMap(encode, &maps->q, p.q, d, p.num_heads, p.num_queries, d, d * p.num_heads, 1, kTile);
  // A consumer stores its own half of a tile. A first tile that begins within a block is shorter:
  // its own map makes the copy engine drop the rest.
  if (error == cudaSuccess) {
    error = MakeMap(encode, &maps->out, p.out, d, p.num_heads, p.num_queries, d, d * p.num_heads, 1,
                    kTile / kConsumers);
  }
  if (error == cudaSuccess) {
    const int64_t first_rows =
        std::min<int64_t>(kTile - (p.num_keys - p.num_queries) % kTile, p.num_queries);
    error = MakeMap(encode, &maps->first_out, p.out, d, p.num_heads, first_rows, d, d * p.num_heads,
                    1, kTile / kConsumers);
  }
  if (error == cudaSuccess) {
    error = MakeMap(encode, &maps->k, p.k, d, p.num_keys, p.num_kv_heads, d, p.kv_head_stride,
                    kTile, 1);
  }
  if (error == cudaSuccess) {
    error = MakeMap(encode, &maps->v, p.v, d, p.num_keys, p.num_kv_heads, d, p.kv_head_stride,
                    kTile, 1);
  }
  return error;
}

// At most kMaxWork heads.
cudaError_t LaunchPart(const AttentionParams& p, const HeadWork* work, int num_work,
                       const TensorMaps& maps, void* scratch, int num_sms, cudaStream_t stream) {
  Launch launch{};
  bool block_mass = false;
  for (int i = 0; i < num_work; ++i) {
    launch.tasks[i] = {work[i].pattern, work[i].last_row, work[i].block_mass, work[i].head};
    block_mass |= work[i].block_mass != nullptr;
  }
  launch.num_query_blocks = NumQueryBlocks(p);
  launch.num_key_blocks = static_cast<int>(CeilDiv(p.num_keys, kTile));
  launch.num_tiles = num_work * launch.num_query_blocks;
  const int first_query = static_cast<int>(p.num_keys - p.num_queries);
  launch.first_query_block = first_query / kTile;
  launch.skipped_queries = first_query % kTile;
  launch.num_queries = static_cast<int>(p.num_queries);
  launch.group = p.num_heads / p.num_kv_heads;
  launch.pattern_words = static_cast<int>(PatternWords(launch.num_key_blocks));
  launch.scale_log2 = p.scale * 1.44269504f;

  auto* base = static_cast<unsigned char*>(scratch);
  launch.next_tile = reinterpret_cast<int*>(base);
  void* order_scratch = base + kCounterBytes;
  launch.row_weights =
      reinterpret_cast<float*>(base + kCounterBytes + OrderScratchBytes(launch.num_tiles));
  if (cudaError_t error = cudaMemsetAsync(launch.next_tile, 0, sizeof(int), stream);
      error != cudaSuccess) {
    return error;
  }
  if (cudaError_t error = OrderTiles(launch, order_scratch, stream); error != cudaSuccess) {
    return error;
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
  size_t bytes =
      kCounterBytes + OrderScratchBytes(std::min(p.num_work, kMaxWork) * NumQueryBlocks(p));
  if (AnyBlockMass(p)) {
    bytes += static_cast<size_t>(num_sms) * CeilDiv(p.num_keys, kTile) * kTile * sizeof(float);
  }
  return bytes;
}

cudaError_t LaunchAttention(const AttentionParams& p, void* scratch, int num_sms,
                            cudaStream_t stream) {
  TensorMaps maps;
  if (cudaError_t error = MakeMaps(p, &maps); error != cudaSuccess) return error;
  for (int first = 0; first < p.num_work; first += kMaxWork) {
    const int count = std::min(kMaxWork, p.num_work - first);
    if (cudaError_t error = LaunchPart(p, p.work + first, count, maps, scratch, num_sms, stream);
        error != cudaSuccess) {
      return error;
    }
  }
  return cudaSuccess;
}

}  // namespace prefilld::kernels::cuda::sm90
