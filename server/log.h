// One event per line: an event name and its fields, as key=value text or as JSON.
#ifndef PREFILLD_SERVER_LOG_H_
#define PREFILLD_SERVER_LOG_H_

#include <cstdint>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "absl/strings/string_view.h"
#include "server/server_options.h"

namespace prefilld::server {

using LogValue = std::variant<std::string, int64_t, double>;
using LogFields = std::vector<std::pair<std::string, LogValue>>;

enum class LogLevel : uint8_t { kInfo, kWarning, kError };

// Once; events before it are dropped. Lines go to standard error.
void InitLogging(LogFormat format);

void LogEvent(LogLevel level, absl::string_view event, const LogFields& fields);

// The line without time and level, for InitLogging's format or for a test.
std::string FormatEvent(LogFormat format, absl::string_view event, const LogFields& fields);

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_LOG_H_
