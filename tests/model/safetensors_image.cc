#include "tests/model/safetensors_image.h"

#include <cstring>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"

namespace prefilld::model {

std::string RawSafetensors(absl::string_view header, absl::string_view data) {
  const uint64_t header_bytes = header.size();
  std::string length(sizeof(header_bytes), '\0');
  std::memcpy(length.data(), &header_bytes, sizeof(header_bytes));
  return absl::StrCat(length, header, data);
}

std::string SafetensorsImage(const std::vector<ImageTensor>& tensors) {
  nlohmann::json header = {{"__metadata__", {{"format", "pt"}}}};
  std::string data;
  for (const ImageTensor& tensor : tensors) {
    const size_t begin = data.size();
    data += tensor.bytes;
    header[tensor.name] = {
        {"dtype", tensor.dtype}, {"shape", tensor.shape}, {"data_offsets", {begin, data.size()}}};
  }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');
  return RawSafetensors(text, data);
}

}  // namespace prefilld::model
