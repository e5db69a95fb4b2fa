// Fuzzes files as a checkpoint folder might hold them. Every tensor of a file that is accepted lies
// inside it.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>

#include "model/checkpoint/safetensors.h"
#include "tests/fuzz/require.h"

namespace prefilld::model {
namespace {

using fuzz::Require;

void CheckTensor(const Tensor& tensor, const std::byte* file, size_t size) {
  Require(tensor.data >= file && tensor.bytes <= size &&
              static_cast<size_t>(tensor.data - file) <= size - tensor.bytes,
          "a tensor lies inside the file");
  size_t elements = 1;
  for (const int64_t dimension : tensor.shape) elements *= static_cast<size_t>(dimension);
  Require(elements * SizeOf(tensor.dtype) == tensor.bytes, "a tensor has the bytes of its shape");
}

}  // namespace
}  // namespace prefilld::model

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace prefilld::model;
  // A mapped file begins at a page, so that alignment is that of the offsets.
  constexpr std::align_val_t kAlignment{64};
  auto* file = static_cast<std::byte*>(operator new(size, kAlignment));
  std::memcpy(file, data, size);
  if (const auto tensors = ParseSafetensors({file, size}); tensors.ok()) {
    for (const auto& [name, tensor] : *tensors) CheckTensor(tensor, file, size);
  }
  operator delete(file, kAlignment);
  return 0;
}
