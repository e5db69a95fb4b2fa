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

// Must be called once; events before it are dropped. Lines go to standard error.
void InitLogging(LogFormat format);

void LogEvent(LogLevel level, absl::string_view event, const LogFields& fields);

// The line of an event without its time and level. Values are quoted and escaped where needed, so
// that what comes from outside can forge neither a field nor a line.
std::string FormatEvent(LogFormat format, absl::string_view event, const LogFields& fields);

}  // namespace prefilld::process

#endif  // PREFILLD_PROTO_PROCESS_LOG_H_
