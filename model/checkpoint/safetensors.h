// Reads safetensors files: they are memory-mapped, and nothing that a file says about itself is
// trusted.
//
// Format: 8 bytes header length N (little-endian), N bytes JSON header, then the data. The header
// maps each tensor's name to {"dtype", "shape", "data_offsets": [begin, end)} relative to the data;
// "__metadata__" may map strings to strings. Tensors fill the data without holes or overlap. Some
// writers pad the header so that the data are aligned, and others do not.
#ifndef PREFILLD_MODEL_CHECKPOINT_SAFETENSORS_H_
#define PREFILLD_MODEL_CHECKPOINT_SAFETENSORS_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "kernels/dtype.h"

namespace prefilld::model {

inline constexpr size_t kMaxSafetensorsHeaderBytes = size_t{16} << 20;
inline constexpr size_t kMaxTensorRank = 8;

// A tensor in mapped memory: row-major, little-endian. The reader that returned it owns the memory.
struct Tensor {
  kernels::DType dtype = kernels::DType::kFp32;
  // The name of an element type that is none of ours, such as "I64"; then `dtype` says nothing.
  // Empty otherwise. Such a tensor may be in a file as long as the model does not use it.
  std::string foreign_dtype;
  std::vector<int64_t> shape;
  const std::byte* data = nullptr;  // at any address: elements must be read with memcpy
  size_t bytes = 0;
};

// The tensors of a file, sorted by name.
using TensorMap = std::map<std::string, Tensor, std::less<>>;

// Parses and checks a whole file image. Every tensor of the result lies inside `file`.
// INVALID_ARGUMENT names tensor and reason.
absl::StatusOr<TensorMap> ParseSafetensors(absl::Span<const std::byte> file);

// The tensors of a checkpoint folder: model.safetensors, or the shards that
// model.safetensors.index.json names. The files stay mapped as long as the object lives, and must
// not be changed meanwhile. Immutable, so thread-safe.
class Checkpoint {
 public:
  // Opens a folder. NOT_FOUND: there are no such files. INVALID_ARGUMENT: the message begins with
  // the file, then the reason. A shard that is missing, or a tensor that is not where the index
  // says, is an error of Find alone, because the model may not need it.
  static absl::StatusOr<std::unique_ptr<Checkpoint>> Open(const std::string& checkpoint_dir);
  ~Checkpoint();

  const TensorMap& tensors() const { return tensors_; }
  // Returns a tensor whose elements can be read. INVALID_ARGUMENT says why there is none: it is
  // missing, its shard is missing, or its element type is not supported.
  absl::StatusOr<const Tensor*> Find(absl::string_view name) const;

 private:
  class MappedFile;
  Checkpoint();
  absl::Status Add(const std::string& path);
  absl::Status AddShards(const std::string& checkpoint_dir, const std::string& index_path);

  std::vector<std::unique_ptr<MappedFile>> files_;
  TensorMap tensors_;
  std::map<std::string, std::string, std::less<>> shard_of_;  // tensor to file, from the index
  std::set<std::string> missing_shards_;
};

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_CHECKPOINT_SAFETENSORS_H_
