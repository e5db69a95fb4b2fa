// Tests what is refused of KV in fp8, whose scales come behind the elements.
#include "client/transfer_check.h"

#include <string>

#include "gmock/gmock.h"
#include "tests/client/scripted_server.h"

namespace prefilld::client {
namespace {

using ::prefill::v1::DType;
using ::prefill::v1::KvLayout;
using ::prefill::v1::KvScales;
using ::testing::HasSubstr;

TEST(CheckLayout, ScalesAreThoseOfTheTypeAndOfTheRequest) {
  KvLayout layout = SmallLayout();
  ExpectedTransfer expected{
      .layout = {}, .num_tokens = layout.num_tokens(), .model_fingerprint = ""};
  const auto expect_refused = [&](const char* why) {
    const absl::Status status = CheckLayout(layout, expected);
    EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition) << status;
    EXPECT_THAT(status.message(), HasSubstr(why));
  };
  EXPECT_TRUE(CheckLayout(layout, expected).ok());
  layout.set_scales(KvScales::KV_SCALES_PER_TOKEN);
  expect_refused("scales is KV_SCALES_PER_TOKEN, allowed: none in dtype DTYPE_FP32");

  layout.set_dtype(DType::DTYPE_FP8_E4M3);
  expected.layout.set_dtype(DType::DTYPE_FP8_E4M3);
  EXPECT_TRUE(CheckLayout(layout, expected).ok()) << "per token is what a request means by default";
  expected.layout.set_scales(KvScales::KV_SCALES_PER_BLOCK);
  expect_refused("scales is KV_SCALES_PER_TOKEN, expected KV_SCALES_PER_BLOCK");
  layout.clear_scales();
  expect_refused("scales is KV_SCALES_UNSPECIFIED, allowed: PER_TOKEN, PER_BLOCK");
  layout.set_scales(static_cast<KvScales>(3));
  expect_refused("scales is 3, allowed: PER_TOKEN, PER_BLOCK");
  layout.set_scales(KvScales::KV_SCALES_PER_BLOCK);
  EXPECT_TRUE(CheckLayout(layout, expected).ok());
  expected.layout.clear_scales();
  expect_refused("scales is KV_SCALES_PER_BLOCK, expected KV_SCALES_PER_TOKEN");
}

// A frame is refused that lacks a scale, has one more, or has those of the other kind.
TEST(TransferCheck, AFrameInFp8HasItsScales) {
  KvLayout layout = SmallLayout();
  layout.set_dtype(DType::DTYPE_FP8_E4M3);
  constexpr int kElements = 2 * 16 * 2 * 8, kPerToken = 4 * 2 * 16 * 2, kPerBlock = 4 * 2 * 2;
  for (const auto scales : {KvScales::KV_SCALES_PER_TOKEN, KvScales::KV_SCALES_PER_BLOCK}) {
    layout.set_scales(scales);
    const int right = kElements + (scales == KvScales::KV_SCALES_PER_TOKEN ? kPerToken : kPerBlock);
    for (const int bytes : {right, right - 4, right + 4, kElements, kElements + kPerToken,
                            kElements + kPerBlock, 4 * kElements}) {
      ::prefill::v1::KvFrame frame = FrameEvent(layout, 0, 0, 0, 0, 1).kv_frame();
      frame.mutable_payload()->resize(bytes);
      SetChecksum(frame);
      TransferCheck check(layout, /*num_lanes=*/1);
      const auto arrival = check.Check(0, wire::MakeReceivedFrame(frame));
      EXPECT_EQ(arrival.ok(), bytes == right) << KvScales_Name(scales) << " " << bytes;
      if (arrival.ok()) continue;
      EXPECT_EQ(arrival.status().code(), absl::StatusCode::kDataLoss);
      EXPECT_THAT(arrival.status().message(), HasSubstr("1 blocks have " + std::to_string(right)));
    }
  }
}

}  // namespace
}  // namespace prefilld::client
