#ifndef PREFILLD_KERNELS_DTYPE_H_
#define PREFILLD_KERNELS_DTYPE_H_

#include <cstddef>
#include <cstdint>

namespace prefilld::kernels {

// Element types of tensors in memory and on the wire, all little-endian.
enum class DType : uint8_t { kBf16, kFp16, kFp32 };

constexpr size_t SizeOf(DType dtype) { return dtype == DType::kFp32 ? 4 : 2; }

constexpr const char* Name(DType dtype) {
  switch (dtype) {
    case DType::kBf16:
      return "bf16";
    case DType::kFp16:
      return "fp16";
    case DType::kFp32:
      return "fp32";
  }
  return "?";
}

}  // namespace prefilld::kernels

#endif  // PREFILLD_KERNELS_DTYPE_H_
