// Makes safetensors files, well-formed or not.
#ifndef PREFILLD_TESTS_MODEL_SAFETENSORS_IMAGE_H_
#define PREFILLD_TESTS_MODEL_SAFETENSORS_IMAGE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"

namespace prefilld::model {

// Makes a file of the length, the header and the data as given. Nothing is checked or padded.
std::string RawSafetensors(absl::string_view header, absl::string_view data);

struct ImageTensor {
  std::string name;
  std::string dtype;  // as the format spells it: "F32"
  std::vector<int64_t> shape;
  std::string bytes;
};

// Makes a well-formed file of these tensors, in this order.
std::string SafetensorsImage(const std::vector<ImageTensor>& tensors);

}  // namespace prefilld::model

#endif  // PREFILLD_TESTS_MODEL_SAFETENSORS_IMAGE_H_
