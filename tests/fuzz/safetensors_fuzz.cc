// Fuzzes files as a checkpoint folder might hold them. Every tensor of a file that is accepted lies
// inside it.
#include <cstddef>
#include <cstdint>

#include "model/checkpoint/safetensors.h"
#include "model/checkpoint/weight_conversion.h"
#include "tests/fuzz/require.h"

namespace prefilld::model {
namespace {

using fuzz::Require;

void CheckTensor(const Tensor& tensor, const std::byte* file, size_t size) {
  Require(tensor.data >= file && tensor.bytes <= size &&
              static_cast<size_t>(tensor.data - file) <= size - tensor.bytes,
          "a tensor lies inside the file");
  if (!tensor.foreign_dtype.empty()) return;  // its elements are never read
  size_t elements = 1;
  for (const int64_t dimension : tensor.shape) elements *= static_cast<size_t>(dimension);
  Require(elements * SizeOf(tensor.dtype) == tensor.bytes, "a tensor has the bytes of its shape");
  // The element is read as loading reads it, wherever it lies.
  float first;
  const int64_t count = elements == 0 ? 0 : 1;
  ConvertElements(tensor.dtype, tensor.data, kernels::DType::kFp32, &first, count);
}

}  // namespace
}  // namespace prefilld::model

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace prefilld::model;
  const auto* file = reinterpret_cast<const std::byte*>(data);
  if (const auto tensors = ParseSafetensors({file, size}); tensors.ok()) {
    for (const auto& [name, tensor] : *tensors) CheckTensor(tensor, file, size);
  }
  return 0;
}
