// Tests the command lines of prefill-calibrate and prefill-bench.
#include <gtest/gtest.h>

#include "tests/proto/program_run.h"

namespace prefilld::model {
namespace {

TEST(CalibrateCommandLine, HelpListsEveryFlagWithItsDefault) {
  ExpectHelpListsEveryFlag(CALIBRATE_BINARY);
}

TEST(CalibrateCommandLine, OpenMpThreadsThatWaitSleep) {
  ExpectOpenMpThreadsSleep(CALIBRATE_BINARY);
}

TEST(BenchCommandLine, OpenMpThreadsThatWaitSleep) { ExpectOpenMpThreadsSleep(BENCH_BINARY); }

TEST(BenchCommandLine, HelpListsEveryFlagWithItsDefault) { ExpectHelpListsEveryFlag(BENCH_BINARY); }

}  // namespace
}  // namespace prefilld::model
