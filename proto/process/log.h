// One event per line: an event name and its fields, as key=value text or as JSON.
#ifndef PREFILLD_PROTO_PROCESS_LOG_H_
#define PREFILLD_PROTO_PROCESS_LOG_H_

#include <cstdint>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "absl/strings/string_view.h"

namespace prefilld::process {

enum class LogFormat : uint8_t { kText, kJson };

using LogValue = std::variant<std::string, int64_t, double>;
using LogFields = std::vector<std::pair<std::string, LogValue>>;

enum class LogLevel : uint8_t { kInfo, kWarning, kError };

// Sets up the log, which goes to standard error. Must be called once; events before it are dropped.
void InitLogging(LogFormat format);

void LogEvent(LogLevel level, absl::string_view event, const LogFields& fields);

// Formats an event without its time and level. Values are quoted and escaped where needed, so that
// text from outside can forge neither a field nor a line.
std::string FormatEvent(LogFormat format, absl::string_view event, const LogFields& fields);

}  // namespace prefilld::process

#endif  // PREFILLD_PROTO_PROCESS_LOG_H_
