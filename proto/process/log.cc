#include "proto/process/log.h"

#include <grpc/support/log.h>
#include <poll.h>
#include <prometheus/collectable.h>
#include <prometheus/metric_family.h>
#include <spdlog/async.h>
#include <spdlog/sinks/base_sink.h>
#include <spdlog/spdlog.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <mutex>
#include <nlohmann/json.hpp>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"

namespace prefilld::process {
namespace {

constexpr char kEventLogger[] = "events";
// Time, level and the braces of JSON take less than what a line has beyond an event.
constexpr size_t kMaxEventBytes = kMaxLogLineBytes - 96;
constexpr size_t kMaxValueBytes = 3000;
constexpr size_t kMaxGrpcMessageBytes = 1000;
constexpr size_t kLeftOutBytes = 32;  // what the last field takes
constexpr size_t kMaxQueuedLines = 2048;
constexpr absl::Duration kFlushAtExit = absl::Seconds(1);

std::atomic<LogFormat> log_format = LogFormat::kText;

std::string JsonString(absl::string_view text) {
  return nlohmann::json(std::string(text))
      .dump(-1, ' ', /*ensure_ascii=*/true, nlohmann::json::error_handler_t::replace);
}

// Returns the text, or its first `keep` bytes and how many there were beyond them.
std::string Cut(absl::string_view text, size_t keep) {
  if (text.size() <= keep) return std::string(text);
  return absl::StrCat(text.substr(0, keep), "... (", text.size() - keep, " bytes more)");
}

// Quotes a value and cuts it to at most `room` bytes, which must hold the note about the cut.
std::string Quote(absl::string_view text, size_t room) {
  for (size_t keep = room;; keep /= 2) {
    const std::string quoted = JsonString(Cut(text, keep));
    if (quoted.size() <= room || keep == 0) return quoted;
  }
}

bool IsPlain(absl::string_view text) {
  return !text.empty() && std::all_of(text.begin(), text.end(), [](char c) {
    return absl::ascii_isgraph(static_cast<unsigned char>(c)) && c != '=' && c != '"';
  });
}

std::string TextValue(const LogValue& value) {
  if (const auto* number = std::get_if<int64_t>(&value)) return absl::StrCat(*number);
  if (const auto* number = std::get_if<double>(&value)) return absl::StrFormat("%.6g", *number);
  const std::string& text = std::get<std::string>(value);
  return IsPlain(text) && text.size() <= kMaxValueBytes ? text : Quote(text, kMaxValueBytes);
}

std::string JsonValue(const LogValue& value) {
  if (const auto* number = std::get_if<int64_t>(&value)) return absl::StrCat(*number);
  if (const auto* number = std::get_if<double>(&value)) return nlohmann::json(*number).dump();
  return Quote(std::get<std::string>(value), kMaxValueBytes);
}

// Writes whole lines to standard error, from the log's thread alone.
class StderrSink final : public spdlog::sinks::base_sink<std::mutex> {
 public:
  // From now on a line that is not taken at once is dropped.
  void StopWaiting() { wait_ = false; }
  int64_t dropped() const { return dropped_; }
  int64_t flushes() const { return flushes_; }

 private:
  void sink_it_(const spdlog::details::log_msg& message) override {
    spdlog::memory_buf_t line;
    formatter_->format(message, line);
    if (!Write({line.data(), line.size()})) ++dropped_;
  }
  void flush_() override { ++flushes_; }

  // Returns false when the line, or what is left of it, cannot be written.
  bool Write(absl::string_view line) {
    while (!line.empty()) {
      if (!AwaitRoom()) return false;
      const ssize_t written = write(STDERR_FILENO, line.data(), line.size());
      if (written > 0) {
        line.remove_prefix(static_cast<size_t>(written));
      } else if (errno != EINTR && errno != EAGAIN) {
        return false;
      }
    }
    return true;
  }

  // Once poll says so, a pipe takes a line without blocking.
  bool AwaitRoom() {
    constexpr int kPollMs = 20;
    pollfd out = {.fd = STDERR_FILENO, .events = POLLOUT, .revents = 0};
    while (true) {
      const int ready = poll(&out, 1, wait_ ? kPollMs : 0);
      if (ready > 0) return (out.revents & POLLOUT) != 0;
      if (ready < 0 && errno != EINTR) return false;
      if (!wait_) return false;
    }
  }

  std::atomic<bool> wait_ = true;
  std::atomic<int64_t> dropped_ = 0;
  std::atomic<int64_t> flushes_ = 0;
};

// The sink lives as long as the process, because threads log to its very end.
StderrSink* sink = nullptr;

// The line of an event that is formatted already, or of a sentence from the layers below.
class LineFormatter final : public spdlog::formatter {
 public:
  void format(const spdlog::details::log_msg& message, spdlog::memory_buf_t& out) override {
    const std::string time = absl::FormatTime("%Y-%m-%dT%H:%M:%E3SZ",
                                              absl::FromChrono(message.time), absl::UTCTimeZone());
    const auto level_name = spdlog::level::to_string_view(message.level);
    const absl::string_view level(level_name.data(), level_name.size());
    const absl::string_view payload(message.payload.data(), message.payload.size());
    const bool is_event =
        absl::string_view(message.logger_name.data(), message.logger_name.size()) == kEventLogger;
    const LogFormat format = log_format;
    std::string line;
    if (format == LogFormat::kJson) {
      line = absl::StrCat("{\"time\":\"", time, "\",\"level\":\"", level, "\",",
                          is_event
                              ? std::string(payload)
                              : FormatEvent(format, "message", {{"message", std::string(payload)}}),
                          "}\n");
    } else {
      line = absl::StrCat(time, " ", level, " ", is_event ? payload : TextSentence(payload), "\n");
    }
    out.append(line.data(), line.data() + line.size());
  }
  std::unique_ptr<spdlog::formatter> clone() const override {
    return std::make_unique<LineFormatter>();
  }

 private:
  static std::string TextSentence(absl::string_view text) {
    const bool plain = std::all_of(text.begin(), text.end(), [](char c) {
      return absl::ascii_isprint(static_cast<unsigned char>(c));
    });
    return plain && text.size() <= kMaxValueBytes ? std::string(text) : Quote(text, kMaxValueBytes);
  }
};

void LogForGrpc(gpr_log_func_args* args) {
  const absl::string_view file(args->file);
  const absl::string_view message = absl::StripAsciiWhitespace(args->message);
  LogEvent(args->severity == GPR_LOG_SEVERITY_ERROR ? LogLevel::kError : LogLevel::kInfo, "grpc",
           {{"at", absl::StrCat(file.substr(file.rfind('/') + 1), ":", args->line)},
            {"message", Cut(message, kMaxGrpcMessageBytes)}});
  // gRPC ends the process next.
  if (absl::StartsWith(message, "assertion failed")) FlushLog(kFlushAtExit);
}

class DroppedLines final : public prometheus::Collectable {
 public:
  std::vector<prometheus::MetricFamily> Collect() const override {
    prometheus::MetricFamily family;
    family.name = "prefilld_log_lines_dropped_total";
    family.help = "Log lines that were dropped because nobody read standard error.";
    family.type = prometheus::MetricType::Counter;
    family.metric.emplace_back().counter.value = static_cast<double>(DroppedLogLines());
    return {family};
  }
};

}  // namespace

std::string FormatEvent(LogFormat format, absl::string_view event, const LogFields& fields) {
  const bool json = format == LogFormat::kJson;
  std::string line = json ? absl::StrCat("\"event\":", JsonString(event)) : std::string(event);
  int64_t left_out = 0;
  const auto add = [&](absl::string_view key, const LogValue& value, size_t room) {
    const std::string field = json ? absl::StrCat(",", JsonString(key), ":", JsonValue(value))
                                   : absl::StrCat(" ", key, "=", TextValue(value));
    if (line.size() + field.size() > room) return false;
    line += field;
    return true;
  };
  for (const auto& [key, value] : fields) {
    if (!add(key, value, kMaxEventBytes - kLeftOutBytes)) ++left_out;
  }
  if (left_out > 0) add("left_out", left_out, kMaxEventBytes);
  return line;
}

void InitLogging(LogFormat format) {
  log_format = format;
  spdlog::init_thread_pool(kMaxQueuedLines, 1);
  const auto shared_sink = std::make_shared<StderrSink>();
  static const std::shared_ptr<StderrSink>* const kept = new std::shared_ptr(shared_sink);
  sink = kept->get();
  const auto logger = [&](const char* name) {
    auto made = std::make_shared<spdlog::async_logger>(
        name, shared_sink, spdlog::thread_pool(), spdlog::async_overflow_policy::overrun_oldest);
    made->set_formatter(std::make_unique<LineFormatter>());
    return made;
  };
  spdlog::register_logger(logger(kEventLogger));
  // The layers below log plain sentences through spdlog's default logger.
  spdlog::set_default_logger(logger("sentences"));
  gpr_set_log_function(&LogForGrpc);
  // spdlog's own end, which comes later, waits for its thread, and that for room.
  std::atexit([] {
    FlushLog(kFlushAtExit);
    sink->StopWaiting();
  });
}

void LogEvent(LogLevel level, absl::string_view event, const LogFields& fields) {
  const auto spdlog_level = level == LogLevel::kError     ? spdlog::level::err
                            : level == LogLevel::kWarning ? spdlog::level::warn
                                                          : spdlog::level::info;
  const auto logger = spdlog::get(kEventLogger);
  if (logger != nullptr) logger->log(spdlog_level, FormatEvent(log_format, event, fields));
}

void FlushLog(absl::Duration timeout) {
  const auto logger = spdlog::get(kEventLogger);
  if (logger == nullptr) return;
  const absl::Time deadline = absl::Now() + timeout;
  static std::atomic<int64_t> asked = 0;
  const int64_t ours = ++asked;
  logger->flush();
  while (sink->flushes() < ours && absl::Now() < deadline) absl::SleepFor(absl::Milliseconds(1));
}

int64_t DroppedLogLines() {
  const auto pool = spdlog::thread_pool();
  if (sink == nullptr || pool == nullptr) return 0;
  return sink->dropped() + static_cast<int64_t>(pool->overrun_counter());
}

std::shared_ptr<prometheus::Collectable> LogMetrics() { return std::make_shared<DroppedLines>(); }

}  // namespace prefilld::process
