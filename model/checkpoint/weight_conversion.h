// Converts element types of checkpoints to those of devices.
#ifndef PREFILLD_MODEL_CHECKPOINT_WEIGHT_CONVERSION_H_
#define PREFILLD_MODEL_CHECKPOINT_WEIGHT_CONVERSION_H_

#include <cstdint>

#include "kernels/dtype.h"

namespace prefilld::model {

// Sets dst[i] = src[i] for `count` elements, rounded to nearest even if the target is narrower.
// Values beyond the range of bf16 or fp16 become infinity, and NaN stays NaN. `dst` is aligned
// to its element size, while `src` need not be: in a file it may lie anywhere. They do not overlap.
void ConvertElements(kernels::DType src_dtype, const void* src, kernels::DType dst_dtype, void* dst,
                     int64_t count);

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_CHECKPOINT_WEIGHT_CONVERSION_H_
