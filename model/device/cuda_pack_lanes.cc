#include "model/device/cuda_pack_lanes.h"

#include <algorithm>

#include "kernels/cuda/kv_pack.h"

namespace prefilld::model {

CudaPackLanes::~CudaPackLanes() {
  for (Lane& lane : lanes_) {
    if (lane.stream != nullptr) cudaStreamDestroy(lane.stream);
    if (lane.device != nullptr) cudaFree(lane.device);
  }
}

cudaError_t CudaPackLanes::Reserve() {
  int least_urgent, most_urgent;
  cudaError_t error = cudaDeviceGetStreamPriorityRange(&least_urgent, &most_urgent);
  for (Lane& lane : lanes_) {
    if (error == cudaSuccess) {
      error = cudaStreamCreateWithPriority(&lane.stream, cudaStreamNonBlocking, most_urgent);
    }
    if (error == cudaSuccess) error = Grow(kPieceBytes, &lane);
  }
  return error;
}

cudaError_t CudaPackLanes::Grow(size_t bytes, Lane* lane) {
  if (lane->device != nullptr) cudaFree(lane->device);
  lane->device = nullptr;
  lane->bytes = 0;
  const cudaError_t error = cudaMalloc(&lane->device, bytes);
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
  // Pieces before the one that failed may still be on their way into params.dst.
  if (error != cudaSuccess) cudaStreamSynchronize(lane->stream);
  Release(lane);
  return error;
}

cudaError_t CudaPackLanes::PackOnLane(const kernels::PackKvParams& params, Lane* lane) {
  if (params.dst_dtype == kernels::DType::kBf16) {
    const cudaError_t error = kernels::cuda::CopyKvToHost(params, lane->stream);
    return error == cudaSuccess ? cudaStreamSynchronize(lane->stream) : error;
  }
  return ConvertOnLane(params, lane);
}

// A kernel converts into the lane's memory. The stream has a higher priority, so the kernel's
// blocks go first wherever an SM comes free; a persistent kernel frees none between two of its
// tiles.
cudaError_t CudaPackLanes::ConvertOnLane(const kernels::PackKvParams& params, Lane* lane) {
  // These are the bytes of K and V of one block together.
  const auto pair_bytes = static_cast<size_t>(kernels::PackedBytes(params) / params.num_blocks);
  if (lane->bytes < pair_bytes) {
    if (cudaError_t error = Grow(pair_bytes, lane); error != cudaSuccess) return error;
  }

  const auto piece_blocks = static_cast<int64_t>(lane->bytes / pair_bytes);
  auto* destination = static_cast<unsigned char*>(params.dst);
  for (int64_t done = 0; done < params.num_blocks; done += piece_blocks) {
    kernels::PackKvParams piece = params;
    piece.first_block += done;
    piece.num_blocks = std::min(piece_blocks, params.num_blocks - done);
    piece.dst = lane->device;
    if (cudaError_t error = kernels::cuda::LaunchPackKv(piece, lane->stream);
        error != cudaSuccess) {
      return error;
    }
    // The output holds the blocks of both tensors together, or the K blocks of the whole call first
    // and then its V blocks.
    const int64_t parts = kernels::IsInterleaved(params.order) ? 1 : 2;
    const size_t block_bytes = pair_bytes / static_cast<size_t>(parts);
    const size_t piece_bytes = static_cast<size_t>(piece.num_blocks) * block_bytes;
    for (int64_t part = 0; part < parts; ++part) {
      const cudaError_t error = cudaMemcpyAsync(
          destination + static_cast<size_t>(part * params.num_blocks + done) * block_bytes,
          static_cast<unsigned char*>(lane->device) + static_cast<size_t>(part) * piece_bytes,
          piece_bytes, cudaMemcpyDeviceToHost, lane->stream);
      if (error != cudaSuccess) return error;
    }
  }
  return cudaStreamSynchronize(lane->stream);
}

}  // namespace prefilld::model
