#ifndef PREFILLD_CLIENT_CLI_PROGRESS_LINE_H_
#define PREFILLD_CLIENT_CLI_PROGRESS_LINE_H_

#include <cstdint>
#include <string>

#include "absl/functional/function_ref.h"
#include "absl/time/time.h"
#include "prefill/v1/prefill.pb.h"

namespace prefilld::client {

// Shows the progress of a call on standard error: on a terminal as one line that is rewritten,
// otherwise as a line every few seconds. Shows nothing if the call ends within a second.
class ProgressLine {
 public:
  explicit ProgressLine(bool enabled);
  ~ProgressLine() { Clear(); }

  void Update(const ::prefill::v1::Progress& progress, uint64_t kv_bytes);
  // Shows the text if it is time to.
  void Show(absl::FunctionRef<std::string()> text);
  // Clears the line, so that other output may follow.
  void Clear();

 private:
  const bool enabled_;
  const bool is_terminal_;
  absl::Time next_;
  bool shown_ = false;
};

// Formats "layer 12 of 32, 4.2 s, 1.1 GB of KV", or "queued behind 3".
std::string ProgressText(const ::prefill::v1::Progress& progress, uint64_t kv_bytes);

}  // namespace prefilld::client

#endif  // PREFILLD_CLIENT_CLI_PROGRESS_LINE_H_
