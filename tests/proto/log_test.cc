#include "proto/process/log.h"

#include <fcntl.h>
#include <grpc/support/log.h>
#include <signal.h>
#include <spdlog/spdlog.h>
#include <sys/wait.h>
#include <unistd.h>

#include <functional>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"

namespace prefilld::process {
namespace {

using ::testing::EndsWith;
using ::testing::HasSubstr;

TEST(Log, TextIsKeyValue) {
  EXPECT_EQ(FormatEvent(LogFormat::kText, "request", {{"id", "a"}, {"n", int64_t{3}}, {"ms", 1.5}}),
            "request id=a n=3 ms=1.5");
}

TEST(Log, ValuesCannotForgeFieldsOrLines) {
  EXPECT_EQ(FormatEvent(LogFormat::kText, "request", {{"id", "a outcome=ok"}}),
            "request id=\"a outcome=ok\"");
  EXPECT_EQ(FormatEvent(LogFormat::kText, "request", {{"id", "\"\n"}}), "request id=\"\\\"\\n\"");
  EXPECT_EQ(FormatEvent(LogFormat::kText, "request", {{"id", ""}}), "request id=\"\"");
}

TEST(Log, JsonIsTheInsideOfOneObject) {
  const std::string line = FormatEvent(
      LogFormat::kJson, "request", {{"id", "say \"hi\"\n\xff"}, {"n", int64_t{3}}, {"ms", 1.5}});
  EXPECT_EQ(line.find('\n'), std::string::npos);
  const auto object = nlohmann::json::parse("{" + line + "}");
  EXPECT_EQ(object["event"], "request");
  EXPECT_EQ(object["n"], 3);
  EXPECT_EQ(object["ms"], 1.5);
}

class BothFormats : public ::testing::TestWithParam<LogFormat> {};

// The text holds C0, DEL and C1 controls, line and paragraph separators, marks of direction, a
// character beyond the basic plane, and bytes that are no UTF-8.
TEST_P(BothFormats, ALineIsPrintableAsciiWhateverIsLogged) {
  const std::string hostile =
      "\x1b[2J\x7f\xc2\x85\xc2\x9b\xe2\x80\xa8\xe2\x80\xa9\xe2\x80\xae\xe2\x81\xa6\xf0\x9f\x92\xa9"
      "\xff\xc2";
  const std::string line = FormatEvent(GetParam(), "request", {{"id", hostile}});
  for (const char c : line) {
    EXPECT_TRUE(c >= 0x20 && c < 0x7f) << static_cast<int>(c) << " in " << line;
  }
  EXPECT_THAT(line, HasSubstr("\\u001b[2J\\u007f\\u0085\\u009b\\u2028\\u2029\\u202e\\u2066"));
}

TEST_P(BothFormats, ALineIsBoundedAndSaysWhatItLacks) {
  const std::string long_text(3'000'000, 'x');
  std::string line = FormatEvent(GetParam(), "request", {{"id", long_text}, {"n", int64_t{1}}});
  EXPECT_LT(line.size(), kMaxLogLineBytes);
  EXPECT_THAT(line, HasSubstr(" bytes more)"));
  EXPECT_THAT(line, HasSubstr(GetParam() == LogFormat::kText ? " n=1" : ",\"n\":1"));

  // Escapes take six bytes each.
  line = FormatEvent(GetParam(), "request",
                     {{"a", std::string(100'000, '\1')}, {"b", long_text}, {"c", long_text}});
  EXPECT_LT(line.size(), kMaxLogLineBytes);
  EXPECT_THAT(line, EndsWith(GetParam() == LogFormat::kText ? " left_out=1" : ",\"left_out\":1"));
}

INSTANTIATE_TEST_SUITE_P(Each, BothFormats, ::testing::Values(LogFormat::kText, LogFormat::kJson));

// A child process whose standard error is a pipe.
class LoggingProcess {
 public:
  explicit LoggingProcess(const std::function<void()>& body) {
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) != 0) abort();
    pid_ = fork();
    if (pid_ == 0) {
      dup2(ends[1], STDERR_FILENO);
      body();
      exit(EXIT_SUCCESS);  // as at the end of main
    }
    close(ends[1]);
    errors_ = ends[0];
  }
  ~LoggingProcess() {
    kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
    close(errors_);
  }

  // Returns the exit code, or -1 if the process still runs after `timeout` or was killed.
  int Wait(absl::Duration timeout) {
    const absl::Time deadline = absl::Now() + timeout;
    int status = 0;
    while (waitpid(pid_, &status, WNOHANG) != pid_) {
      if (absl::Now() > deadline) return -1;
      absl::SleepFor(absl::Milliseconds(5));
    }
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  }

  // Returns its lines up to its end.
  std::vector<std::string> ReadLines() const {
    std::string text;
    char buffer[4096];
    for (ssize_t n; (n = read(errors_, buffer, sizeof(buffer))) > 0;) text.append(buffer, n);
    std::vector<std::string> lines = absl::StrSplit(text, '\n');
    EXPECT_EQ(lines.back(), "");
    lines.pop_back();
    return lines;
  }

 private:
  pid_t pid_ = -1;
  int errors_ = -1;
};

TEST(LoggingProcess, SentencesAndLinesOfGrpcAreEventsToo) {
  const LoggingProcess process([] {
    InitLogging(LogFormat::kJson);
    LogEvent(LogLevel::kWarning, "ours", {{"n", int64_t{1}}});
    spdlog::info("two\nlines");
    gpr_set_log_verbosity(GPR_LOG_SEVERITY_ERROR);  // as at gRPC's start
    gpr_log(GPR_ERROR, "from\n%s", std::string(5000, 'x').c_str());
  });
  const std::vector<std::string> lines = process.ReadLines();
  ASSERT_EQ(lines.size(), 3);
  std::vector<nlohmann::json> events;
  for (const std::string& line : lines) events.push_back(nlohmann::json::parse(line));
  EXPECT_EQ(events[0]["event"], "ours");
  EXPECT_EQ(events[0]["level"], "warning");
  EXPECT_EQ(events[1]["message"], "two\nlines");
  EXPECT_EQ(events[2]["event"], "grpc");
  EXPECT_THAT(std::string(events[2]["at"]), HasSubstr("log_test.cc:"));
  EXPECT_THAT(std::string(events[2]["message"]), HasSubstr("bytes more)"));
}

TEST(LoggingProcess, NobodyWaitsForAReaderThatDoesNotRead) {
  constexpr int kDone = 7;
  LoggingProcess process([] {
    InitLogging(LogFormat::kText);
    const absl::Time start = absl::Now();
    for (int i = 0; i < 20'000; ++i) {
      LogEvent(LogLevel::kInfo, "line", {{"text", std::string(1000, 'x')}});
    }
    const bool fast = absl::Now() - start < absl::Seconds(10);
    _exit(!fast ? 1 : DroppedLogLines() > 10'000 ? kDone : 2);
  });
  EXPECT_EQ(process.Wait(absl::Seconds(30)), kDone);
}

TEST(LoggingProcess, EndsThoughNobodyReads) {
  LoggingProcess process([] {
    InitLogging(LogFormat::kText);
    for (int i = 0; i < 20'000; ++i) LogEvent(LogLevel::kInfo, "line", {{"i", int64_t{i}}});
  });
  EXPECT_EQ(process.Wait(absl::Seconds(10)), EXIT_SUCCESS);
}

TEST(LoggingProcess, WhatWasLoggedLastIsWritten) {
  const LoggingProcess process([] {
    InitLogging(LogFormat::kText);
    for (int i = 0; i < 1000; ++i) LogEvent(LogLevel::kInfo, "line", {{"i", int64_t{i}}});
    FlushLog(absl::Seconds(5));
    _exit(EXIT_SUCCESS);
  });
  const std::vector<std::string> lines = process.ReadLines();
  ASSERT_EQ(lines.size(), 1000);
  EXPECT_THAT(lines.back(), EndsWith(" info line i=999"));
}

}  // namespace
}  // namespace prefilld::process
