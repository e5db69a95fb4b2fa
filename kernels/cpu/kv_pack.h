// PackKv of kernels/kv_pack.h from fp32. It runs on the calling thread, so that it can run beside
// the ops, which use the threads of kernels/cpu/threads.h.
#ifndef PREFILLD_KERNELS_CPU_KV_PACK_H_
#define PREFILLD_KERNELS_CPU_KV_PACK_H_

#include "kernels/kv_pack.h"

namespace prefilld::kernels::cpu {

void PackKv(const PackKvParams& params);

}  // namespace prefilld::kernels::cpu

#endif  // PREFILLD_KERNELS_CPU_KV_PACK_H_
