// Writes a safetensors file of fp32 tensors piece by piece, so that it may be larger than memory.
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

// The header is written first, from the shapes, and the values follow in the order of `tensors`.
// The file has the suffix ".part" until Finish renames it, and is removed if Finish is never
// called, so a file without the suffix is whole. Errors begin with the path. Not thread-safe.
class SafetensorsWriter {
 public:
  static absl::StatusOr<std::unique_ptr<SafetensorsWriter>> Create(
      const std::string& path, const std::vector<TensorShape>& tensors,
      const std::map<std::string, std::string>& metadata);
  SafetensorsWriter(const SafetensorsWriter&) = delete;
  SafetensorsWriter& operator=(const SafetensorsWriter&) = delete;
  ~SafetensorsWriter();

  // Writes the next values. Pieces may end anywhere.
  absl::Status Append(absl::Span<const float> values);

  // Renames the file. FAILED_PRECONDITION when the tensors are not filled exactly.
  absl::Status Finish();

  int64_t file_bytes() const { return file_bytes_; }  // valid after Finish

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
