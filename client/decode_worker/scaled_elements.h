#ifndef PREFILLD_CLIENT_DECODE_WORKER_SCALED_ELEMENTS_H_
#define PREFILLD_CLIENT_DECODE_WORKER_SCALED_ELEMENTS_H_

#include <cstdint>

#include "kernels/dtype.h"
#include "prefill/v1/kv.pb.h"

namespace prefilld::client {

// Turns K or V of a frame in DTYPE_FP8_E4M3 into what its elements stand for, each times its scale.
//
// `layout` has the order, NHD or HND, and the shape of the blocks; `payload` is that of the frame,
// which has been checked. `out` gets the elements in the same order, in bf16, rounded to the
// nearest, or in fp32: `to` is the type in which a decoder computes.
void Unscale(const ::prefill::v1::KvLayout& layout, int64_t num_blocks, bool is_value,
             const uint8_t* payload, kernels::DType to, uint8_t* out);

}  // namespace prefilld::client

#endif  // PREFILLD_CLIENT_DECODE_WORKER_SCALED_ELEMENTS_H_
