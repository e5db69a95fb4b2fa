#include "model/checkpoint/safetensors.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "model/checkpoint/lfs_pointer.h"
#include "model/checkpoint/strict_json.h"
#include "proto/status_macros.h"

namespace prefilld::model {
namespace {

using kernels::DType;
using nlohmann::json;

constexpr size_t kLengthBytes = 8;
constexpr size_t kMaxIndexBytes = size_t{16} << 20;
constexpr int kMaxHeaderDepth = 3;  // header, tensor, array

std::optional<DType> ParseDType(const json& name) {
  if (name == "BF16") return DType::kBf16;
  if (name == "F16") return DType::kFp16;
  if (name == "F32") return DType::kFp32;
  return std::nullopt;
}

std::optional<uint64_t> Unsigned(const json& value) {
  if (!value.is_number_unsigned()) return std::nullopt;
  return value.get<uint64_t>();
}

absl::Status CheckMetadata(const json& metadata) {
  if (!metadata.is_object()) return absl::InvalidArgumentError("__metadata__ is not an object");
  for (const auto& [key, value] : metadata.items()) {
    if (!value.is_string()) {
      return absl::InvalidArgumentError(
          absl::StrCat("__metadata__: ", Shown(key), " is not a string"));
    }
  }
  return absl::OkStatus();
}

struct Extent {
  uint64_t begin = 0;
  uint64_t end = 0;
  const std::string* name = nullptr;
};

// Parses one entry of the header. `data` is all that follows the header.
absl::StatusOr<Tensor> ParseTensor(const json& entry, absl::Span<const std::byte> data,
                                   Extent& extent) {
  if (!entry.is_object() || entry.size() != 3 || !entry.contains("dtype") ||
      !entry.contains("shape") || !entry.contains("data_offsets")) {
    return absl::InvalidArgumentError(
        absl::StrCat("expected dtype, shape and data_offsets, found ", Shown(entry)));
  }
  Tensor tensor;
  const json& dtype_name = entry["dtype"];
  if (!dtype_name.is_string()) {
    return absl::InvalidArgumentError(absl::StrCat("dtype ", Shown(dtype_name), " is not a name"));
  }
  const std::optional<DType> dtype = ParseDType(dtype_name);
  tensor.dtype = dtype.value_or(DType::kFp32);
  if (!dtype) tensor.foreign_dtype = dtype_name.get<std::string>();

  const json& shape = entry["shape"];
  if (!shape.is_array() || shape.size() > kMaxTensorRank) {
    return absl::InvalidArgumentError(absl::StrCat(
        "shape ", Shown(shape), " is not an array of at most ", kMaxTensorRank, " dimensions"));
  }
  int64_t bytes = dtype ? static_cast<int64_t>(SizeOf(tensor.dtype)) : 1;
  for (const json& dimension : shape) {
    const std::optional<uint64_t> size = Unsigned(dimension);
    int64_t product = 0;
    if (!size || *size > uint64_t{INT64_MAX} ||
        __builtin_mul_overflow(bytes, static_cast<int64_t>(*size), &product)) {
      return absl::InvalidArgumentError(absl::StrCat("shape ", Shown(shape), " is out of range"));
    }
    bytes = product;
    tensor.shape.push_back(static_cast<int64_t>(*size));
  }

  const json& offsets = entry["data_offsets"];
  const std::optional<uint64_t> begin =
      offsets.is_array() && offsets.size() == 2 ? Unsigned(offsets[0]) : std::nullopt;
  const std::optional<uint64_t> end = begin ? Unsigned(offsets[1]) : std::nullopt;
  if (!end || *begin > *end || *end > data.size()) {
    return absl::InvalidArgumentError(absl::StrCat("data_offsets ", Shown(offsets),
                                                   " do not lie within the ", data.size(),
                                                   " bytes of data that the file has"));
  }
  // The sizes of foreign types are not known here, and some are smaller than a byte.
  if (dtype && *end - *begin != static_cast<uint64_t>(bytes)) {
    return absl::InvalidArgumentError(absl::StrCat("data_offsets ", Shown(offsets), " hold ",
                                                   *end - *begin, " bytes; shape ", Shown(shape),
                                                   " of ", Name(tensor.dtype), " needs ", bytes));
  }
  tensor.data = data.data() + *begin;
  tensor.bytes = static_cast<size_t>(*end - *begin);
  extent.begin = *begin;
  extent.end = *end;
  return tensor;
}

// Checks that the tensors fill [0, data_bytes) exactly.
absl::Status CheckCoverage(std::vector<Extent> extents, uint64_t data_bytes) {
  std::sort(extents.begin(), extents.end(), [](const Extent& a, const Extent& b) {
    return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
  });
  uint64_t covered = 0;
  for (const Extent& extent : extents) {
    if (extent.begin != covered) {
      return absl::InvalidArgumentError(
          absl::StrCat("tensor ", Shown(*extent.name),
                       extent.begin < covered ? " overlaps" : " leaves a hole after",
                       " the tensor before it: begins at ", extent.begin, ", expected ", covered));
    }
    covered = extent.end;
  }
  if (covered != data_bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat(data_bytes - covered, " bytes at the end belong to no tensor"));
  }
  return absl::OkStatus();
}

// Says what is wrong with a header length. Text read as a length is a huge number, so that a file
// which is text is shown as such.
absl::Status BadHeaderLength(uint64_t header_bytes, absl::Span<const std::byte> file) {
  const absl::string_view start(reinterpret_cast<const char*>(file.data()), kLengthBytes);
  if (std::all_of(start.begin(), start.end(), absl::ascii_isprint)) {
    return absl::InvalidArgumentError(
        absl::StrCat("begins with the text ", Shown(std::string(start)),
                     ", where a safetensors file has the length of its header"));
  }
  return absl::InvalidArgumentError(absl::StrCat(
      "header length ", header_bytes, " exceeds the file's ", file.size() - kLengthBytes,
      " bytes or the limit of ", kMaxSafetensorsHeaderBytes));
}

}  // namespace

absl::StatusOr<TensorMap> ParseSafetensors(absl::Span<const std::byte> file) {
  PREFILLD_RETURN_IF_ERROR(
      CheckNotLfsPointer({reinterpret_cast<const char*>(file.data()), file.size()}));
  if (file.size() < kLengthBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("file of ", file.size(), " bytes is too short for a header"));
  }
  uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, file.data(), kLengthBytes);
  if (header_bytes > kMaxSafetensorsHeaderBytes || header_bytes > file.size() - kLengthBytes) {
    return BadHeaderLength(header_bytes, file);
  }
  const absl::string_view header(reinterpret_cast<const char*>(file.data()) + kLengthBytes,
                                 header_bytes);
  const absl::Span<const std::byte> data = file.subspan(kLengthBytes + header_bytes);
  absl::StatusOr<json> parsed = ParseStrictJson(header, kMaxHeaderDepth);
  if (!parsed.ok()) {
    return absl::InvalidArgumentError(absl::StrCat("header: ", parsed.status().message()));
  }
  if (!parsed->is_object()) return absl::InvalidArgumentError("header is not a JSON object");

  TensorMap tensors;
  std::vector<Extent> extents;
  for (const auto& [name, entry] : parsed->items()) {
    if (name == "__metadata__") {
      PREFILLD_RETURN_IF_ERROR(CheckMetadata(entry));
      continue;
    }
    Extent extent;
    absl::StatusOr<Tensor> tensor = ParseTensor(entry, data, extent);
    if (!tensor.ok()) {
      return absl::InvalidArgumentError(
          absl::StrCat("tensor ", Shown(name), ": ", tensor.status().message()));
    }
    const auto place = tensors.emplace(name, *std::move(tensor)).first;
    extent.name = &place->first;
    extents.push_back(extent);
  }
  PREFILLD_RETURN_IF_ERROR(CheckCoverage(std::move(extents), data.size()));
  return tensors;
}

// A read-only private mapping of a regular file.
class Checkpoint::MappedFile {
 public:
  static absl::StatusOr<std::unique_ptr<MappedFile>> Map(const std::string& path) {
    const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (fd < 0) return absl::NotFoundError(std::strerror(errno));
    struct stat status {};
    void* data = MAP_FAILED;
    std::string error;
    if (fstat(fd, &status) != 0) {
      error = std::strerror(errno);
    } else if (!S_ISREG(status.st_mode) || status.st_size == 0) {
      error = "empty, or not a regular file";
    } else {
      data = mmap(nullptr, static_cast<size_t>(status.st_size), PROT_READ, MAP_PRIVATE, fd, 0);
      if (data == MAP_FAILED) error = std::strerror(errno);
    }
    close(fd);  // the mapping keeps the file
    if (!error.empty()) return absl::InvalidArgumentError(error);
    return std::unique_ptr<MappedFile>(new MappedFile(data, static_cast<size_t>(status.st_size)));
  }
  ~MappedFile() { munmap(data_, bytes_); }
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  absl::Span<const std::byte> contents() const {
    return {static_cast<const std::byte*>(data_), bytes_};
  }

 private:
  MappedFile(void* data, size_t bytes) : data_(data), bytes_(bytes) {}

  void* const data_;
  const size_t bytes_;
};

namespace {

// Accepts names of files in the folder itself only. A name with separators could lead out of it.
bool IsShardName(absl::string_view name) {
  return absl::EndsWith(name, ".safetensors") && !absl::StrContains(name, '/') &&
         !absl::StrContains(name, '\\') && !absl::StrContains(name, '\0') &&
         !absl::StartsWith(name, ".");
}

// Reads the weight_map of an index, which names the shard file of each tensor.
absl::StatusOr<std::map<std::string, std::string, std::less<>>> ReadWeightMap(
    const std::string& path) {
  PREFILLD_ASSIGN_OR_RETURN(const json index, ReadJsonObject(path, kMaxIndexBytes));
  const auto weight_map = index.find("weight_map");
  if (weight_map == index.end() || !weight_map->is_object() || weight_map->empty()) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": no weight_map"));
  }
  std::map<std::string, std::string, std::less<>> shard_of;
  for (const auto& [name, shard] : weight_map->items()) {
    if (!shard.is_string() || !IsShardName(shard.get_ref<const std::string&>())) {
      return absl::InvalidArgumentError(
          absl::StrCat(path, ": weight_map[", Shown(name), "] = ", Shown(shard),
                       " is not the name of a .safetensors file in this folder"));
    }
    shard_of.emplace(name, shard.get<std::string>());
  }
  return shard_of;
}

}  // namespace

Checkpoint::Checkpoint() = default;
Checkpoint::~Checkpoint() = default;

absl::StatusOr<const Tensor*> Checkpoint::Find(absl::string_view name) const {
  if (const auto found = tensors_.find(name); found != tensors_.end()) {
    const std::string& foreign = found->second.foreign_dtype;
    if (foreign.empty()) return &found->second;
    return absl::InvalidArgumentError(absl::StrCat("tensor ", name, ": dtype ", Shown(foreign),
                                                   " unsupported; built for BF16, F16, F32"));
  }
  std::string reason = " is missing";
  if (const auto shard = shard_of_.find(name); shard != shard_of_.end()) {
    reason = absl::StrCat(missing_shards_.contains(shard->second)
                              ? " is missing, and so is the file that the index names for it, "
                              : " is missing in the file that the index names for it, ",
                          shard->second);
  }
  return absl::InvalidArgumentError(absl::StrCat("tensor ", name, reason));
}

absl::Status Checkpoint::Add(const std::string& path) {
  absl::StatusOr<std::unique_ptr<MappedFile>> file = MappedFile::Map(path);
  if (!file.ok()) {
    return absl::Status(file.status().code(), absl::StrCat(path, ": ", file.status().message()));
  }
  absl::StatusOr<TensorMap> tensors = ParseSafetensors((*file)->contents());
  if (!tensors.ok()) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": ", tensors.status().message()));
  }
  files_.push_back(*std::move(file));
  tensors_.merge(*tensors);
  if (!tensors->empty()) {  // what merge leaves behind was there before
    return absl::InvalidArgumentError(absl::StrCat(
        path, ": tensor ", Shown(tensors->begin()->first), " is also in another shard"));
  }
  return absl::OkStatus();
}

absl::Status Checkpoint::AddShards(const std::string& checkpoint_dir,
                                   const std::string& index_path) {
  PREFILLD_ASSIGN_OR_RETURN(shard_of_, ReadWeightMap(index_path));
  std::set<std::string> shards;
  for (const auto& [name, shard] : shard_of_) shards.insert(shard);
  absl::Status missing;
  for (const std::string& shard : shards) {
    const absl::Status status = Add(absl::StrCat(checkpoint_dir, "/", shard));
    if (absl::IsNotFound(status)) {
      missing = status;
      missing_shards_.insert(shard);
    } else {
      PREFILLD_RETURN_IF_ERROR(status);
    }
  }
  return missing_shards_.size() < shards.size() ? absl::OkStatus() : missing;
}

absl::StatusOr<std::unique_ptr<Checkpoint>> Checkpoint::Open(const std::string& checkpoint_dir) {
  const std::string index_path = absl::StrCat(checkpoint_dir, "/model.safetensors.index.json");
  std::unique_ptr<Checkpoint> checkpoint(new Checkpoint());
  std::error_code ignored;
  if (!std::filesystem::exists(index_path, ignored)) {
    PREFILLD_RETURN_IF_ERROR(checkpoint->Add(absl::StrCat(checkpoint_dir, "/model.safetensors")));
    return checkpoint;
  }
  PREFILLD_RETURN_IF_ERROR(checkpoint->AddShards(checkpoint_dir, index_path));
  return checkpoint;
}

}  // namespace prefilld::model
