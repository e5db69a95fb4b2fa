#include "kernels/cpu/threads.h"

#include <gtest/gtest.h>

namespace prefilld::kernels::cpu {
namespace {

TEST(CpuThreads, QuotaIsRoundedDownToWholeCores) {
  EXPECT_EQ(CoresOfQuota("200000 100000"), 2);
  EXPECT_EQ(CoresOfQuota("350000 100000\n"), 3);
  EXPECT_EQ(CoresOfQuota("20000 100000"), 1);
}

TEST(CpuThreads, NoQuotaIsZero) {
  for (const char* text : {"max 100000", "", "100000", "-1 100000", "5 0", "nonsense"}) {
    EXPECT_EQ(CoresOfQuota(text), 0) << text;
  }
}

TEST(CpuThreads, AtLeastOneIsAvailable) { EXPECT_GE(AvailableThreads(), 1); }

}  // namespace
}  // namespace prefilld::kernels::cpu
