#include "proto/process/file_watch.h"

#include <atomic>
#include <string>

#include <gtest/gtest.h>

#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"

namespace prefilld::process {
namespace {

constexpr absl::Duration kSoon = absl::Seconds(20);

TEST(FileWatch, ReadsOnAnOperatorsWordWhateverHasChanged) {
  std::atomic<int> ordered = 0;
  FileWatch watch({{.versions = [] { return std::string("1"); },
                    .read = "1",
                    .reload = [&ordered](bool by_operator) { ordered += by_operator ? 1 : 0; }}});
  EXPECT_TRUE(watch.ReloadNow(kSoon));
  EXPECT_EQ(ordered, 1);
  EXPECT_TRUE(watch.ReloadNow(kSoon));
  EXPECT_EQ(ordered, 2);
  EXPECT_TRUE(watch.Stop(kSoon));
}

TEST(FileWatch, AFileThatHangsHoldsUpNobodyElse) {
  absl::Notification hangs, comes_back;
  std::atomic<int> read = 0;
  FileWatch watch({{.versions = [] { return std::string("1"); },
                    .read = "1",
                    .reload =
                        [&](bool) {
                          if (!hangs.HasBeenNotified()) hangs.Notify();
                          comes_back.WaitForNotification();
                          ++read;
                        }}});
  EXPECT_FALSE(watch.ReloadNow());  // returns at once
  hangs.WaitForNotification();
  EXPECT_FALSE(watch.ReloadNow(absl::Milliseconds(20))) << "though it waits, it has an end";
  EXPECT_FALSE(watch.Stop(absl::Milliseconds(20)));
  EXPECT_EQ(read, 0);
  comes_back.Notify();
  EXPECT_TRUE(watch.Stop(kSoon));
}

TEST(FileWatch, AnOrderThatComesDuringALookIsCarriedOutAfterIt) {
  absl::Notification began, go_on;
  std::atomic<int> read = 0;
  FileWatch watch({{.versions = [] { return std::string("1"); },
                    .read = "1",
                    .reload =
                        [&](bool) {
                          if (++read > 1) return;
                          began.Notify();
                          go_on.WaitForNotification();
                        }}});
  watch.ReloadNow();
  began.WaitForNotification();
  watch.ReloadNow();
  go_on.Notify();
  const absl::Time deadline = absl::Now() + kSoon;
  while (read < 2 && absl::Now() < deadline) absl::SleepFor(absl::Milliseconds(1));
  EXPECT_EQ(read, 2) << "what was read before the order may be out of date";
}

TEST(FileWatch, WithoutFilesThereIsNothingToDo) {
  FileWatch watch({});
  EXPECT_TRUE(watch.ReloadNow(kSoon));
  EXPECT_TRUE(watch.Stop(kSoon));
}

}  // namespace
}  // namespace prefilld::process
