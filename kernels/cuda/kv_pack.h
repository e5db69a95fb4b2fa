// Packs KV on CUDA; the op's contract is kernels/kv_pack.h.
#ifndef PREFILLD_KERNELS_CUDA_KV_PACK_H_
#define PREFILLD_KERNELS_CUDA_KV_PACK_H_

#include <cuda_runtime_api.h>

#include "kernels/kv_pack.h"

namespace prefilld::kernels::cuda {

// Packs into device memory. head_dim is a multiple of 8.
cudaError_t LaunchPackKv(const PackKvParams& params, cudaStream_t stream);

// Packs into pinned host memory without a kernel, by strided copies of the copy engines; dst_dtype
// must be bf16. The copies run beside an attention kernel that holds every SM until its last tile,
// behind which LaunchPackKv would wait. Tokens past the last are zeroed before this returns.
cudaError_t CopyKvToHost(const PackKvParams& params, cudaStream_t stream);

}  // namespace prefilld::kernels::cuda

#endif  // PREFILLD_KERNELS_CUDA_KV_PACK_H_
