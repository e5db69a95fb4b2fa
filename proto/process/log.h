// One event per line: an event name and its fields, as key=value text or as JSON.
//
// A line is printable ASCII and has at most kMaxLogLineBytes. Everything else is written as in JSON
// strings, \n or \u202e, in text as well: control characters of all kinds, marks that change the
// direction of writing, line separators, bytes that are no UTF-8. So text from outside can forge
// neither a field nor a line, nor change how a line looks.
//
// Logging never blocks the thread that logs. Lines wait in a bounded queue for a thread that writes
// them to standard error. When nobody reads that, the oldest are dropped and counted.
#ifndef PREFILLD_PROTO_PROCESS_LOG_H_
#define PREFILLD_PROTO_PROCESS_LOG_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "absl/strings/string_view.h"
#include "absl/time/time.h"

namespace prometheus {
class Collectable;
}

namespace prefilld::process {

enum class LogFormat : uint8_t { kText, kJson };

using LogValue = std::variant<std::string, int64_t, double>;
using LogFields = std::vector<std::pair<std::string, LogValue>>;

enum class LogLevel : uint8_t { kInfo, kWarning, kError };

// A line with its end. A pipe takes so many bytes at once or not at all.
inline constexpr size_t kMaxLogLineBytes = 4096;

// Sets up the log, and has gRPC and the layers below log through it, too. Must be called once;
// events before it are dropped. The process's end waits up to a second for lines that are still to
// be written.
void InitLogging(LogFormat format);

void LogEvent(LogLevel level, absl::string_view event, const LogFields& fields);

// Waits until what was logged before is written, but not longer than that.
void FlushLog(absl::Duration timeout);

// Returns how many lines were dropped because standard error did not take them.
int64_t DroppedLogLines();
// The same as the metric prefilld_log_lines_dropped_total.
std::shared_ptr<prometheus::Collectable> LogMetrics();

// Formats an event without its time and level; in JSON, the inside of an object. A value that is
// too long is cut and says by how many bytes; fields for which the line has no room are left out,
// and a last field `left_out` says how many.
std::string FormatEvent(LogFormat format, absl::string_view event, const LogFields& fields);

}  // namespace prefilld::process

#endif  // PREFILLD_PROTO_PROCESS_LOG_H_
