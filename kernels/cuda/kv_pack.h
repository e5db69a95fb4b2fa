// Packing KV on CUDA; contract: kernels/kv_pack.h.
#ifndef PREFILLD_KERNELS_CUDA_KV_PACK_H_
#define PREFILLD_KERNELS_CUDA_KV_PACK_H_

#include <cuda_runtime_api.h>

#include "kernels/kv_pack.h"

namespace prefilld::kernels::cuda {

// params.dst is device memory. head_dim is a multiple of 8.
cudaError_t LaunchPackKv(const PackKvParams& params, cudaStream_t stream);

// The same without a kernel, for dst_dtype bf16 and params.dst in pinned host memory: strided
// copies by the copy engines. They run beside an attention kernel that holds every SM until its
// last tile, behind which LaunchPackKv would wait. What lies past the last token is zeroed before
// this returns.
cudaError_t CopyKvToHost(const PackKvParams& params, cudaStream_t stream);

}  // namespace prefilld::kernels::cuda

#endif  // PREFILLD_KERNELS_CUDA_KV_PACK_H_
