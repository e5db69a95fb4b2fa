// Packs KV on CUDA; the op's contract is kernels/kv_pack.h.
//
// No kernel packs. It would wait behind an attention kernel that holds every SM until its last
// tile, whatever its stream's priority, because such a kernel leaves an SM neither registers nor
// shared memory for another block. Copy engines run beside it. They change no type, so what is not
// wanted in bf16 is copied to the host as it is and packed there by cpu::PackKv, of which a core
// with AVX-512 does 1.6 (fp8) to 2.8 (fp16) * 10^9 elements a second.
#ifndef PREFILLD_KERNELS_CUDA_KV_PACK_H_
#define PREFILLD_KERNELS_CUDA_KV_PACK_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/kv_pack.h"

namespace prefilld::kernels::cuda {

// Packs bf16 into pinned host memory by strided copies; dst_dtype must be bf16, without scales.
// Tokens past the last are zeroed before this returns.
cudaError_t CopyKvToHost(const PackKvParams& params, cudaStream_t stream);

// Returns the bytes of the tokens that `params` packs, as they are on the device:
// [2 (K, V), num_heads, tokens, head_dim] in bf16.
int64_t SourceBytes(const PackKvParams& params);
// Copies these tokens to `source`, SourceBytes() of pinned host memory.
cudaError_t CopySourceToHost(const PackKvParams& params, void* source, cudaStream_t stream);
// Returns the params with which cpu::PackKv makes of them what `params` asks for, once the copies
// are done.
PackKvParams FromSource(const PackKvParams& params, const void* source);

}  // namespace prefilld::kernels::cuda

#endif  // PREFILLD_KERNELS_CUDA_KV_PACK_H_
