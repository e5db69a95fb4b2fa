#include "model/calibration/safetensors_writer.h"

#include <bit>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <system_error>

#include "absl/strings/str_cat.h"

namespace prefilld::model {

static_assert(std::endian::native == std::endian::little, "safetensors are little-endian");

absl::StatusOr<std::unique_ptr<SafetensorsWriter>> SafetensorsWriter::Create(
    const std::string& path, const std::vector<TensorShape>& tensors,
    const std::map<std::string, std::string>& metadata) {
  // The object keeps its order, because readers may expect the data in the header's order.
  nlohmann::ordered_json header;
  header["__metadata__"] = metadata;
  int64_t bytes = 0;
  for (const TensorShape& tensor : tensors) {
    int64_t end = sizeof(float);
    for (int64_t extent : tensor.shape) end *= extent;
    end += bytes;
    header[tensor.name] = {
        {"dtype", "F32"}, {"shape", tensor.shape}, {"data_offsets", {bytes, end}}};
    bytes = end;
  }
  std::string text =
      header.dump(-1, ' ', /*ensure_ascii=*/true, nlohmann::json::error_handler_t::replace);
  text.resize((text.size() + 7) / 8 * 8, ' ');  // aligns the data
  const uint64_t text_bytes = text.size();

  std::unique_ptr<SafetensorsWriter> writer(new SafetensorsWriter(path));
  writer->values_left_ = bytes / static_cast<int64_t>(sizeof(float));
  writer->file_bytes_ = static_cast<int64_t>(sizeof(text_bytes) + text_bytes) + bytes;
  writer->file_.open(writer->part_path_, std::ios::binary | std::ios::trunc);
  writer->file_.write(reinterpret_cast<const char*>(&text_bytes), sizeof(text_bytes));
  writer->file_.write(text.data(), static_cast<std::streamsize>(text.size()));
  if (!writer->file_) return writer->Error(std::strerror(errno));
  return writer;
}

SafetensorsWriter::~SafetensorsWriter() {
  if (finished_) return;
  file_.close();
  std::error_code ignored;
  std::filesystem::remove(part_path_, ignored);
}

absl::Status SafetensorsWriter::Append(absl::Span<const float> values) {
  if (static_cast<int64_t>(values.size()) > values_left_) {
    return absl::FailedPreconditionError(absl::StrCat(
        path_, ": ", values.size(), " values for the ", values_left_, " that are left"));
  }
  values_left_ -= static_cast<int64_t>(values.size());
  file_.write(reinterpret_cast<const char*>(values.data()),
              static_cast<std::streamsize>(values.size() * sizeof(float)));
  return file_ ? absl::OkStatus() : Error(std::strerror(errno));
}

absl::Status SafetensorsWriter::Finish() {
  if (values_left_ != 0) {
    return absl::FailedPreconditionError(
        absl::StrCat(path_, ": ", values_left_, " values are missing"));
  }
  file_.close();
  if (!file_) return Error(std::strerror(errno));
  std::error_code error;
  std::filesystem::rename(part_path_, path_, error);
  if (error) return Error(error.message());
  finished_ = true;
  return absl::OkStatus();
}

absl::Status SafetensorsWriter::Error(absl::string_view reason) const {
  return absl::UnavailableError(absl::StrCat(path_, ": ", reason));
}

}  // namespace prefilld::model
