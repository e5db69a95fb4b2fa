#include "proto/process/log.h"

#include <algorithm>
#include <atomic>
#include <ctime>
#include <memory>

#include <spdlog/pattern_formatter.h>
#include <spdlog/sinks/stdout_color_sinks.h>
#include <spdlog/spdlog.h>
#include <nlohmann/json.hpp>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace prefilld::process {
namespace {

constexpr char kEventLogger[] = "events";
constexpr char kTextPattern[] = "%Y-%m-%dT%H:%M:%S.%eZ %^%l%$ %v";
constexpr char kJsonStart[] = "{\"time\":\"%Y-%m-%dT%H:%M:%S.%eZ\",\"level\":\"%l\",";

std::atomic<LogFormat> log_format = LogFormat::kText;

// Writes the message as a JSON string.
class JsonPayload final : public spdlog::custom_flag_formatter {
 public:
  void format(const spdlog::details::log_msg& message, const std::tm&,
              spdlog::memory_buf_t& out) override {
    const std::string text =
        nlohmann::json(std::string(message.payload.data(), message.payload.size()))
            .dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
    out.append(text.data(), text.data() + text.size());
  }
  std::unique_ptr<custom_flag_formatter> clone() const override {
    return std::make_unique<JsonPayload>();
  }
};

// Quotes a value, so that it can forge neither a field nor a line.
std::string Quote(const std::string& text) {
  std::string quoted = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') quoted += '\\';
    if (absl::ascii_iscntrl(static_cast<unsigned char>(c))) {
      absl::StrAppendFormat(&quoted, "\\x%02x", c);
    } else {
      quoted += c;
    }
  }
  return quoted + '"';
}

std::string TextValue(const LogValue& value) {
  if (const auto* number = std::get_if<int64_t>(&value)) return absl::StrCat(*number);
  if (const auto* number = std::get_if<double>(&value)) return absl::StrFormat("%.6g", *number);
  const std::string& text = std::get<std::string>(value);
  const bool plain = !text.empty() && std::all_of(text.begin(), text.end(), [](char c) {
    return absl::ascii_isgraph(static_cast<unsigned char>(c)) && c != '=' && c != '"';
  });
  return plain ? text : Quote(text);
}

std::string TextLine(absl::string_view event, const LogFields& fields) {
  std::string line(event);
  for (const auto& [key, value] : fields) absl::StrAppend(&line, " ", key, "=", TextValue(value));
  return line;
}

// Formats the fields of the object without its braces; the line's pattern adds time and level.
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
  const bool json = format == LogFormat::kJson;
  const auto events = spdlog::stderr_color_mt(kEventLogger);
  events->set_pattern(json ? absl::StrCat(kJsonStart, "%v}") : kTextPattern,
                      spdlog::pattern_time_type::utc);

  // The layers below log plain sentences through spdlog's default logger.
  const auto sentences = spdlog::stderr_color_mt("sentences");
  auto formatter = std::make_unique<spdlog::pattern_formatter>(spdlog::pattern_time_type::utc);
  formatter->add_flag<JsonPayload>('*').set_pattern(
      json ? absl::StrCat(kJsonStart, "\"event\":\"message\",\"message\":%*}") : kTextPattern);
  sentences->set_formatter(std::move(formatter));
  spdlog::set_default_logger(sentences);
}

void LogEvent(LogLevel level, absl::string_view event, const LogFields& fields) {
  const auto spdlog_level = level == LogLevel::kError     ? spdlog::level::err
                            : level == LogLevel::kWarning ? spdlog::level::warn
                                                          : spdlog::level::info;
  const auto logger = spdlog::get(kEventLogger);
  if (logger != nullptr) logger->log(spdlog_level, "{}", FormatEvent(log_format, event, fields));
}

}  // namespace prefilld::process
