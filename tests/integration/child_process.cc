#include "tests/integration/child_process.h"

#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"

namespace prefilld::integration {
namespace {

constexpr absl::Duration kPoll = absl::Milliseconds(5);
constexpr absl::Duration kStartTimeout = absl::Seconds(30);

std::string MakeFolder() {
  std::string path = (std::filesystem::temp_directory_path() / "prefilld-process-XXXXXX").string();
  if (mkdtemp(path.data()) == nullptr) abort();
  return path;
}

std::string ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return std::string(std::istreambuf_iterator<char>(file), {});
}

// Runs in the child and does not return.
void Execute(const std::string& folder, const std::vector<std::string>& command,
             int error_descriptor) {
  std::vector<char*> argv;
  for (const std::string& word : command) argv.push_back(const_cast<char*>(word.c_str()));
  argv.push_back(nullptr);
  const auto redirect = [&](const char* name, int descriptor) {
    const int file = open((folder + name).c_str(), O_CREAT | O_WRONLY | O_TRUNC, 0600);
    dup2(file, descriptor);
  };
  redirect("/stdout", STDOUT_FILENO);
  if (error_descriptor >= 0) {
    dup2(error_descriptor, STDERR_FILENO);
  } else {
    redirect("/stderr", STDERR_FILENO);
  }
  execv(argv[0], argv.data());
  _exit(127);
}

}  // namespace

ChildProcess::ChildProcess(const std::string& program, const std::vector<std::string>& args,
                           int error_descriptor)
    : folder_(MakeFolder()) {
  std::vector<std::string> command = {absl::StrCat(PREFILLD_BIN_DIR, "/", program)};
  command.insert(command.end(), args.begin(), args.end());
  pid_ = fork();
  if (pid_ < 0) abort();
  if (pid_ == 0) Execute(folder_, command, error_descriptor);
}

ChildProcess::~ChildProcess() {
  Signal(SIGKILL);
  Wait(absl::InfiniteDuration());
  std::error_code ignored;
  std::filesystem::remove_all(folder_, ignored);
}

void ChildProcess::Signal(int signal) {
  if (!exit_code_) kill(pid_, signal);
}

std::optional<int> ChildProcess::Wait(absl::Duration timeout) {
  const absl::Time deadline = absl::Now() + timeout;
  while (!exit_code_) {
    int status = 0;
    if (waitpid(pid_, &status, WNOHANG) == pid_) {
      exit_code_ = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    } else if (absl::Now() >= deadline) {
      return std::nullopt;
    } else {
      absl::SleepFor(kPoll);
    }
  }
  return exit_code_;
}

std::string ChildProcess::stdout_text() const { return ReadFile(folder_ + "/stdout"); }
bool ChildProcess::AwaitBlocked(int signal, absl::Duration timeout) const {
  const std::string field = "SigBlk:\t";
  const std::string path = absl::StrCat("/proc/", pid_, "/status");
  for (const absl::Time end = absl::Now() + timeout; absl::Now() < end;) {
    const std::string status = ReadFile(path);
    const size_t at = status.find(field);
    const uint64_t blocked = at == std::string::npos
                                 ? 0
                                 : std::stoull(status.substr(at + field.size(), 16), nullptr, 16);
    if ((blocked >> (signal - 1)) & 1) return true;
    absl::SleepFor(kPoll);
  }
  return false;
}

std::string ChildProcess::stderr_text() const { return ReadFile(folder_ + "/stderr"); }

bool ChildProcess::AwaitStderr(const std::string& text, absl::Duration timeout) const {
  const absl::Time deadline = absl::Now() + timeout;
  while (!absl::StrContains(stderr_text(), text)) {
    if (absl::Now() > deadline) return false;
    absl::SleepFor(kPoll);
  }
  return true;
}

ServerProcess::ServerProcess(const std::string& program, std::vector<std::string> args,
                             int error_descriptor)
    : ServerProcess(program, std::move(args), MakeFolder() + "/ports", error_descriptor) {}

ServerProcess::ServerProcess(const std::string& program, std::vector<std::string> args,
                             const std::string& port_file, int error_descriptor)
    : ChildProcess(
          program,
          [&] {
            for (const std::string flag : {"--listen=", "--metrics_listen="}) {
              const bool given = std::any_of(
                  args.begin(), args.end(),
                  [&flag](const std::string& arg) { return absl::StartsWith(arg, flag); });
              if (!given) args.push_back(flag + "127.0.0.1:0");
            }
            args.push_back("--port_file=" + port_file);
            return args;
          }(),
          error_descriptor) {
  const absl::Time deadline = absl::Now() + kStartTimeout;
  while (true) {
    if (auto ports = wire::ReadPortFile(port_file); ports.ok()) {
      ports_ = *ports;
      break;
    }
    if (Wait(kPoll).has_value() || absl::Now() > deadline) {
      std::fprintf(stderr, "%s did not start:\n%s", program.c_str(), stderr_text().c_str());
      abort();
    }
  }
  std::error_code ignored;
  std::filesystem::remove_all(std::filesystem::path(port_file).parent_path(), ignored);
}

std::string ServerProcess::AddressOf(int port) { return absl::StrCat("127.0.0.1:", port); }

}  // namespace prefilld::integration
