#include "proto/wire/request_id.h"

#include <string>

#include <gtest/gtest.h>

namespace prefilld::wire {
namespace {

TEST(CheckId, TakesUpTo128PrintableCharacters) {
  EXPECT_TRUE(CheckId("request_id", "").ok());
  EXPECT_TRUE(CheckId("request_id", "job 7/~").ok());
  EXPECT_TRUE(CheckId("request_id", std::string(128, 'x')).ok());
}

TEST(CheckId, NamesFieldSizeAndLimitOfWhatItRefuses) {
  const absl::Status status = CheckId("transfer_id", std::string(129, 'x'));
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(status.message(),
            "transfer_id of 129 bytes, allowed: at most 128 printable ASCII characters");
  for (const char* id : {"a\nb", "\x7f", "caf\xc3\xa9"}) {
    EXPECT_FALSE(CheckId("request_id", id).ok()) << id;
  }
  EXPECT_FALSE(CheckId("request_id", std::string("a\0b", 3)).ok());
}

TEST(ShownId, AValidIdIsShownWholeAndALongOneIsCut) {
  EXPECT_EQ(ShownId(std::string(kMaxIdBytes, 'x')).size(), kMaxIdBytes);
  EXPECT_EQ(ShownId(std::string(100000, 'x')),
            std::string(kMaxIdBytes, 'x') + "... (99872 bytes more)");
  EXPECT_EQ(ShownReason(std::string(100000, 'x')),
            std::string(300, 'x') + "... (99700 bytes more)");
}

}  // namespace
}  // namespace prefilld::wire
