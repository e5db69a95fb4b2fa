#include "server/log.h"

#include <atomic>

#include <spdlog/sinks/stdout_color_sinks.h>
#include <spdlog/spdlog.h>
#include <nlohmann/json.hpp>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace prefilld::server {
namespace {

std::atomic<LogFormat> log_format = LogFormat::kText;

std::string TextValue(const LogValue& value) {
  if (const auto* number = std::get_if<int64_t>(&value)) return absl::StrCat(*number);
  if (const auto* number = std::get_if<double>(&value)) return absl::StrFormat("%.6g", *number);
  const std::string& text = std::get<std::string>(value);
  const bool plain = !text.empty() && text.find_first_of(" =\"\\\n\t\r") == std::string::npos;
  return plain ? text : absl::StrCat("\"", absl::CEscape(text), "\"");
}

std::string TextLine(absl::string_view event, const LogFields& fields) {
  std::string line(event);
  for (const auto& [key, value] : fields) absl::StrAppend(&line, " ", key, "=", TextValue(value));
  return line;
}

// The fields of the object, without its braces: the line's pattern adds time and level.
std::string JsonFields(absl::string_view event, const LogFields& fields) {
  nlohmann::ordered_json object;
  object["event"] = std::string(event);
  for (const auto& [key, value] : fields) {
    std::visit([&object, &key = key](const auto& v) { object[key] = v; }, value);
  }
  const std::string text =
      object.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
  return text.substr(1, text.size() - 2);
}

}  // namespace

std::string FormatEvent(LogFormat format, absl::string_view event, const LogFields& fields) {
  return format == LogFormat::kJson ? JsonFields(event, fields) : TextLine(event, fields);
}

void InitLogging(LogFormat format) {
  log_format = format;
  spdlog::set_default_logger(spdlog::stderr_color_mt("prefilld"));
  spdlog::set_pattern(format == LogFormat::kJson
                          ? "{\"time\":\"%Y-%m-%dT%H:%M:%S.%eZ\",\"level\":\"%l\",%v}"
                          : "%Y-%m-%dT%H:%M:%S.%eZ %^%l%$ %v",
                      spdlog::pattern_time_type::utc);
}

void LogEvent(LogLevel level, absl::string_view event, const LogFields& fields) {
  const auto spdlog_level = level == LogLevel::kError     ? spdlog::level::err
                            : level == LogLevel::kWarning ? spdlog::level::warn
                                                          : spdlog::level::info;
  if (!spdlog::should_log(spdlog_level)) return;
  spdlog::log(spdlog_level, "{}", FormatEvent(log_format, event, fields));
}

}  // namespace prefilld::server
