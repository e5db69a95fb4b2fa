#include "model/checkpoint/lfs_pointer.h"

#include <cstdint>
#include <string>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"

namespace prefilld::model {
namespace {

constexpr absl::string_view kFirstLine = "version https://git-lfs.github.com/spec/v1";
// The specification bounds a pointer's length. A longer text that begins like one is something
// else.
constexpr size_t kMaxPointerBytes = 1024;

// Returns the line "size N" as words, or nothing if the pointer has none.
std::string SizeOfContent(absl::string_view pointer) {
  for (absl::string_view line : absl::StrSplit(pointer, '\n')) {
    uint64_t bytes = 0;
    if (absl::ConsumePrefix(&line, "size ") && absl::SimpleAtoi(line, &bytes)) {
      return absl::StrCat(" of ", bytes, " bytes");
    }
  }
  return "";
}

}  // namespace

absl::Status CheckNotLfsPointer(absl::string_view content) {
  if (content.size() > kMaxPointerBytes || !absl::StartsWith(content, kFirstLine)) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(
      absl::StrCat("is a Git LFS pointer, and the file", SizeOfContent(content),
                   " that it stands for was not fetched; `git lfs pull` in this folder does so"));
}

}  // namespace prefilld::model
