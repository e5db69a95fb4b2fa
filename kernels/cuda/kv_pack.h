// Packing KV on CUDA; contract: kernels/kv_pack.h.
#ifndef PREFILLD_KERNELS_CUDA_KV_PACK_H_
#define PREFILLD_KERNELS_CUDA_KV_PACK_H_

#include <cuda_runtime_api.h>

#include "kernels/kv_pack.h"

namespace prefilld::kernels::cuda {

// params.dst is device memory. head_dim is a multiple of 8.
cudaError_t LaunchPackKv(const PackKvParams& params, cudaStream_t stream);

}  // namespace prefilld::kernels::cuda

#endif  // PREFILLD_KERNELS_CUDA_KV_PACK_H_
