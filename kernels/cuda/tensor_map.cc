#include "kernels/cuda/tensor_map.h"

namespace prefilld::kernels::cuda {
namespace {

constexpr uint32_t kBoxColumns = 64;

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// Finds the driver's function at run time, so that the program links and starts without a driver.
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

}  // namespace

cudaError_t MakeTensorMap(const TensorTiles& tiles, CUtensorMap* map) {
  EncodeTiled encode = nullptr;
  if (cudaError_t error = FindEncodeTiled(&encode); error != cudaSuccess) return error;
  const cuuint32_t rank = tiles.dims[3] > 0 ? 4 : 3;
  const cuuint64_t dims[4] = {tiles.dims[0], tiles.dims[1], tiles.dims[2], tiles.dims[3]};
  const cuuint64_t stride_bytes[3] = {tiles.strides[0] * 2, tiles.strides[1] * 2,
                                      tiles.strides[2] * 2};
  const cuuint32_t box[4] = {kBoxColumns, tiles.box1, tiles.box2, 1};
  const cuuint32_t element_strides[4] = {1, 1, 1, 1};
  const CUresult result = encode(
      map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, rank, const_cast<void*>(tiles.data), dims,
      stride_bytes, box, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace prefilld::kernels::cuda
