// Signals end processes, so each test runs in a process of its own: a child that exits.
#include "proto/process/signals.h"

#include <sys/wait.h>
#include <unistd.h>

#include <functional>

#include <gtest/gtest.h>

namespace prefilld::process {
namespace {

constexpr int kDone = 42;

// Returns the exit code of a child that runs `body`, or that a signal ends.
int ExitCodeOf(const std::function<void()>& body) {
  const pid_t child = fork();
  if (child == 0) {
    body();
    _exit(kDone);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

TEST(EndSignals, OneIsTakenAndTheNextEndsTheProcessAtOnce) {
  EXPECT_EQ(ExitCodeOf([] {
              const EndSignals signals;
              kill(getpid(), SIGTERM);
              if (signals.Await([] { return false; }, [] {}) != SIGTERM) _exit(1);
            }),
            kDone);
  EXPECT_EQ(ExitCodeOf([] {
              const EndSignals signals;
              kill(getpid(), SIGINT);
              if (signals.Await([] { return false; }, [] {}) != SIGINT) return;
              kill(getpid(), SIGTERM);
            }),
            EXIT_FAILURE);
}

TEST(EndSignals, AFailureEndsTheWait) {
  EXPECT_EQ(ExitCodeOf([] {
              const EndSignals signals;
              if (signals.Await([] { return true; }, [] {}) != 0) _exit(1);
            }),
            kDone);
}

TEST(EndSignals, AHangupEndsNothing) {
  EXPECT_EQ(ExitCodeOf([] {
              const EndSignals signals;
              {
                const ExitOnSignal exit_on_signal(signals, [](int) {});
                kill(getpid(), SIGHUP);
                usleep(100'000);
              }
              int hangups = 0;
              const auto on_hangup = [&hangups] {
                if (++hangups == 2) kill(getpid(), SIGTERM);
                kill(getpid(), SIGHUP);
              };
              if (signals.Await([] { return false; }, on_hangup) != SIGTERM) _exit(1);
              kill(getpid(), SIGHUP);  // during the drain
              if (hangups < 2) _exit(2);
            }),
            kDone);
}

TEST(EndSignals, AClosedPipeIsAnErrorCode) {
  EXPECT_EQ(ExitCodeOf([] {
              const EndSignals signals;
              int ends[2];
              if (pipe(ends) != 0) _exit(1);
              close(ends[0]);
              if (write(ends[1], "x", 1) != -1) _exit(1);
            }),
            kDone);
}

TEST(ExitOnSignal, EndsTheProcessWithSuccessWhileItLives) {
  EXPECT_EQ(ExitCodeOf([] {
              const EndSignals signals;
              const ExitOnSignal exit_on_signal(signals, [](int) {});
              kill(getpid(), SIGTERM);
              while (true) pause();
            }),
            EXIT_SUCCESS);
}

TEST(ExitOnSignal, LeavesLaterSignalsToAwait) {
  EXPECT_EQ(ExitCodeOf([] {
              const EndSignals signals;
              {
                const ExitOnSignal exit_on_signal(signals, [](int) {});
              }
              kill(getpid(), SIGTERM);
              if (signals.Await([] { return false; }, [] {}) != SIGTERM) _exit(1);
            }),
            kDone);
}

}  // namespace
}  // namespace prefilld::process
