// Recognises the short text that Git LFS leaves in place of a file whose content was not fetched.
#ifndef PREFILLD_MODEL_CHECKPOINT_LFS_POINTER_H_
#define PREFILLD_MODEL_CHECKPOINT_LFS_POINTER_H_

#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace prefilld::model {

// INVALID_ARGUMENT if `content`, a whole file, is such a text. The message says how to get the
// file.
absl::Status CheckNotLfsPointer(absl::string_view content);

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_CHECKPOINT_LFS_POINTER_H_
