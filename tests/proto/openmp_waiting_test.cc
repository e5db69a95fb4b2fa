// Tests how OpenMP threads wait in a program that lets them sleep. The program is this test, which
// is started with nothing about OpenMP in its environment.
#include "proto/process/openmp_waiting.h"

#include <omp.h>
#include <time.h>
#include <unistd.h>

#include <cstdlib>
#include <fstream>
#include <iostream>
#include <string>

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gtest/gtest.h"
#include "tests/proto/program_run.h"

namespace prefilld::process {
namespace {

absl::Duration CpuTime() {
  timespec time = {};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
  return absl::DurationFromTimespec(time);
}

// Lets a second thread wait for the first one, which sleeps 50 times for 5 ms, and returns the CPU
// time of both.
absl::Duration CpuTimeOfWaiting() {
  const absl::Duration before = CpuTime();
  for (int i = 0; i < 50; ++i) {
#pragma omp parallel num_threads(2)
    {
      if (omp_get_thread_num() == 0) absl::SleepFor(absl::Milliseconds(5));
    }
  }
  return CpuTime() - before;
}

// A thread that spins takes most of the quarter of a second.
TEST(LetOpenMpThreadsSleep, AThreadThatWaitsTakesLittleTime) {
  EXPECT_LT(CpuTimeOfWaiting(), absl::Milliseconds(60));
}

TEST(LetOpenMpThreadsSleep, TheProgramKeepsItsName) {
  std::string name;
  std::getline(std::ifstream("/proc/self/comm"), name);
  EXPECT_EQ(name, std::string("openmp_waiting_test").substr(0, 15));
}

TEST(LetOpenMpThreadsSleep, LeavesWhatSomebodyHasSet) {
  for (const std::string setting :
       {"OMP_WAIT_POLICY=active", "GOMP_SPINCOUNT=7", "KMP_BLOCKTIME=9"}) {
    const auto [status, output] =
        RunCommand("env -u OMP_WAIT_POLICY -u GOMP_SPINCOUNT " + setting + " /proc/" +
                   std::to_string(getpid()) + "/exe --print_environment");
    EXPECT_EQ(status, 0);
    EXPECT_EQ(output, setting + "\n");
  }
}

}  // namespace
}  // namespace prefilld::process

int main(int argc, char** argv) {
  const absl::Status status = prefilld::process::LetOpenMpThreadsSleep(argv);
  if (argc == 2 && std::string(argv[1]) == "--print_environment") {
    for (const char* name : {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}) {
      if (std::getenv(name) != nullptr) std::cout << name << "=" << std::getenv(name) << "\n";
    }
    return status.ok() ? 0 : 1;
  }
  testing::InitGoogleTest(&argc, argv);
  return status.ok() ? RUN_ALL_TESTS() : 1;
}
