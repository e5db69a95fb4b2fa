#include "proto/process/openmp_waiting.h"

#include <sys/auxv.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <filesystem>
#include <system_error>

namespace prefilld::process {
namespace {

constexpr char kWaitPolicy[] = "OMP_WAIT_POLICY";
constexpr char kSpinCount[] = "GOMP_SPINCOUNT";  // of GNU's library
constexpr char kBlockTime[] = "KMP_BLOCKTIME";   // of LLVM's

// The turns of libgomp's waiting loop before a thread sleeps, which are some tens of microseconds.
// They bridge the gaps between the ops of a layer, where going to sleep and waking would cost more.
constexpr char kFewSpins[] = "1000";

}  // namespace

absl::Status LetOpenMpThreadsSleep(char** argv) {
  for (const char* name : {kWaitPolicy, kSpinCount, kBlockTime}) {
    if (std::getenv(name) != nullptr) return absl::OkStatus();
  }
  // Started by the dynamic linker as its argument, the process is an execution of the linker.
  if (getauxval(AT_BASE) == 0) {
    return absl::FailedPreconditionError("the program was not executed by its own name");
  }
  // The process keeps its name in lists of processes if it is executed by its path.
  std::error_code error;
  const std::filesystem::path path = std::filesystem::read_symlink("/proc/self/exe", error);
  if (error) return absl::ErrnoToStatus(error.value(), "/proc/self/exe");
  setenv(kWaitPolicy, "passive", /*overwrite=*/0);
  setenv(kSpinCount, kFewSpins, /*overwrite=*/0);
  execv(path.c_str(), argv);
  return absl::ErrnoToStatus(errno, path.string());
}

}  // namespace prefilld::process
