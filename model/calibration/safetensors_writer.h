// Writing a safetensors file of fp32 tensors piece by piece, so that it may be larger than memory.
#ifndef PREFILLD_MODEL_CALIBRATION_SAFETENSORS_WRITER_H_
#define PREFILLD_MODEL_CALIBRATION_SAFETENSORS_WRITER_H_

#include <cstdint>
#include <fstream>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"

namespace prefilld::model {

struct TensorShape {
  std::string name;
  std::vector<int64_t> shape;
};

// The header is written first, from the shapes; the values follow in the order of `tensors`. The
// file has the suffix ".part" until Finish gives it its name, and is removed when that never
// happens: what bears the name is whole. Errors begin with the path. Not thread-safe.
class SafetensorsWriter {
 public:
  static absl::StatusOr<std::unique_ptr<SafetensorsWriter>> Create(
      const std::string& path, const std::vector<TensorShape>& tensors,
      const std::map<std::string, std::string>& metadata);
  SafetensorsWriter(const SafetensorsWriter&) = delete;
  SafetensorsWriter& operator=(const SafetensorsWriter&) = delete;
  ~SafetensorsWriter();

  // The next values; pieces need not end where tensors do.
  absl::Status Append(absl::Span<const float> values);

  // FAILED_PRECONDITION when the tensors are not filled exactly.
  absl::Status Finish();

  int64_t file_bytes() const { return file_bytes_; }  // when finished

 private:
  explicit SafetensorsWriter(const std::string& path) : path_(path), part_path_(path + ".part") {}
  absl::Status Error(absl::string_view reason) const;

  const std::string path_;
  const std::string part_path_;
  std::ofstream file_;
  int64_t values_left_ = 0;
  int64_t file_bytes_ = 0;
  bool finished_ = false;
};

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_CALIBRATION_SAFETENSORS_WRITER_H_
