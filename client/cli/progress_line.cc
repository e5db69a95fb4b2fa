#include "client/cli/progress_line.h"

#include <unistd.h>

#include <cstdio>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "client/cli/summary.h"

namespace prefilld::client {
namespace {

constexpr absl::Duration kFirstAfter = absl::Seconds(1);
constexpr absl::Duration kTerminalInterval = absl::Milliseconds(100);
constexpr absl::Duration kLogInterval = absl::Seconds(5);

}  // namespace

ProgressLine::ProgressLine(bool enabled)
    : enabled_(enabled), is_terminal_(isatty(STDERR_FILENO)), next_(absl::Now() + kFirstAfter) {}

void ProgressLine::Update(const ::prefill::v1::Progress& progress, uint64_t kv_bytes) {
  Show([&] { return ProgressText(progress, kv_bytes); });
}

void ProgressLine::Show(absl::FunctionRef<std::string()> text) {
  const absl::Time now = absl::Now();
  if (!enabled_ || now < next_) return;
  if (is_terminal_) {
    std::fprintf(stderr, "\r\x1b[K%s", text().c_str());
    shown_ = true;
  } else {
    std::fprintf(stderr, "%s\n", text().c_str());
  }
  std::fflush(stderr);
  next_ = now + (is_terminal_ ? kTerminalInterval : kLogInterval);
}

void ProgressLine::Clear() {
  if (!shown_) return;
  std::fprintf(stderr, "\r\x1b[K");
  std::fflush(stderr);
  shown_ = false;
}

std::string ProgressText(const ::prefill::v1::Progress& progress, uint64_t kv_bytes) {
  if (progress.queue_position() > 0) {
    return absl::StrCat("queued behind ", progress.queue_position());
  }
  return absl::StrFormat("layer %u of %u, %.1f s, %s of KV", progress.layers_computed(),
                         progress.num_layers(), 1e-6 * progress.elapsed_us(), BytesText(kv_bytes));
}

}  // namespace prefilld::client
