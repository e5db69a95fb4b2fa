#include "model/device/cuda_pack_lanes.h"

#include <algorithm>

#include "kernels/cpu/ops.h"
#include "kernels/cuda/kv_pack.h"

namespace prefilld::model {

CudaPackLanes::~CudaPackLanes() {
  for (Lane& lane : lanes_) {
    if (lane.stream != nullptr) cudaStreamDestroy(lane.stream);
    if (lane.source != nullptr) cudaFreeHost(lane.source);
  }
}

cudaError_t CudaPackLanes::Reserve() {
  cudaError_t error = cudaSuccess;
  for (Lane& lane : lanes_) {
    if (error == cudaSuccess) {
      error = cudaStreamCreateWithFlags(&lane.stream, cudaStreamNonBlocking);
    }
    if (error == cudaSuccess) error = Grow(kSourceBytes, &lane);
  }
  return error;
}

cudaError_t CudaPackLanes::Grow(size_t bytes, Lane* lane) {
  if (lane->source != nullptr) cudaFreeHost(lane->source);
  lane->source = nullptr;
  lane->bytes = 0;
  const cudaError_t error = cudaMallocHost(&lane->source, bytes);
  if (error == cudaSuccess) lane->bytes = bytes;
  return error;
}

CudaPackLanes::Lane* CudaPackLanes::Acquire() {
  const auto find_free = [this] {
    return std::find_if(lanes_.begin(), lanes_.end(), [](const Lane& lane) { return !lane.busy; });
  };
  const auto some_free = [&] { return find_free() != lanes_.end(); };
  absl::MutexLock lock(&mu_, absl::Condition(&some_free));
  Lane* lane = &*find_free();
  lane->busy = true;
  return lane;
}

void CudaPackLanes::Release(Lane* lane) {
  absl::MutexLock lock(&mu_);
  lane->busy = false;
}

cudaError_t CudaPackLanes::Pack(const kernels::PackKvParams& params) {
  if (params.num_blocks == 0) return cudaSuccess;
  Lane* lane = Acquire();
  const cudaError_t error = PackOnLane(params, lane);
  // Copies before the one that failed may still be under way.
  if (error != cudaSuccess) cudaStreamSynchronize(lane->stream);
  Release(lane);
  return error;
}

cudaError_t CudaPackLanes::PackOnLane(const kernels::PackKvParams& params, Lane* lane) {
  const bool as_it_is =
      params.dst_dtype == kernels::DType::kBf16 && params.scales == kernels::KvScales::kNone;
  if (!as_it_is) return ConvertOnLane(params, lane);
  const cudaError_t error = kernels::cuda::CopyKvToHost(params, lane->stream);
  return error == cudaSuccess ? cudaStreamSynchronize(lane->stream) : error;
}

cudaError_t CudaPackLanes::ConvertOnLane(const kernels::PackKvParams& params, Lane* lane) {
  const auto bytes = static_cast<size_t>(kernels::cuda::SourceBytes(params));
  cudaError_t error = bytes > lane->bytes ? Grow(bytes, lane) : cudaSuccess;
  if (error == cudaSuccess) {
    error = kernels::cuda::CopySourceToHost(params, lane->source, lane->stream);
  }
  if (error == cudaSuccess) error = cudaStreamSynchronize(lane->stream);
  if (error == cudaSuccess) {
    kernels::cpu::PackKv(kernels::cuda::FromSource(params, lane->source));
  }
  return error;
}

}  // namespace prefilld::model
