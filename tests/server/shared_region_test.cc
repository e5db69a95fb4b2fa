// Tests the memory that a consumer maps: what whoever has its descriptor cannot do, and how a
// request is charged for it.
#include "server/shared_region.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "proto/wire/frame_codec.h"
#include "server/grpc_encoding.h"
#include "server/staging_ring.h"
#include "tests/server/fake_engine.h"

namespace prefilld::server {
namespace {

constexpr size_t kBufferBytes = 10'000;  // no whole pages
constexpr int64_t kLimit = 1 << 20;
constexpr auto kAtOnce = [] { return true; };

class SharedRegionTest : public ::testing::Test {
 protected:
  std::shared_ptr<SharedRegion> NewRegion(int num_buffers) {
    auto region = SharedRegion::Create(engine_, use_, kBufferBytes, num_buffers);
    EXPECT_TRUE(region.ok()) << region.status();
    return *std::move(region);
  }

  FakeEngine engine_{FakeEngineOptions()};
  const std::shared_ptr<SharedMemoryUse> use_ = std::make_shared<SharedMemoryUse>(kLimit);
};

TEST_F(SharedRegionTest, WhoeverHasTheDescriptorCanReadItAndNothingElse) {
  const auto region = NewRegion(2);
  const int fd = region->descriptor();
  const size_t bytes = region->bytes();
  std::memset(region->buffers()[1], 'k', kBufferBytes);
  void* const read = mmap(nullptr, bytes, PROT_READ, MAP_SHARED, fd, 0);
  ASSERT_NE(read, MAP_FAILED);
  const uint64_t offset = region->OffsetOf(region->buffers()[1]);
  EXPECT_EQ(std::memcmp(static_cast<char*>(read) + offset, region->buffers()[1], kBufferBytes), 0);

  EXPECT_EQ(ftruncate(fd, 0), -1) << "it shrinks, and the server's next write ends the process";
  EXPECT_EQ(ftruncate(fd, static_cast<off_t>(2 * bytes)), -1);
  EXPECT_EQ(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 4096), -1);
  EXPECT_EQ(pwrite(fd, "x", 1, 0), -1);
  EXPECT_EQ(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0), MAP_FAILED);
  EXPECT_EQ(mprotect(read, bytes, PROT_READ | PROT_WRITE), -1);
  EXPECT_EQ(fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE), -1) << "the server could not write any more";
  munmap(read, bytes);
  std::memset(region->buffers()[0], 'v', kBufferBytes);  // the server still can
}

TEST_F(SharedRegionTest, AllRegionsTogetherKeepTheLimit) {
  auto first = NewRegion(40);
  const auto refused = SharedRegion::Create(engine_, use_, kBufferBytes, 60);
  EXPECT_TRUE(absl::IsResourceExhausted(refused.status())) << refused.status();
  EXPECT_THAT(refused.status().message(), ::testing::HasSubstr("1048576"));
  EXPECT_EQ(use_->used, static_cast<int64_t>(first->bytes())) << "a refusal is charged";
  first.reset();
  EXPECT_EQ(use_->used, 0);
  NewRegion(60);
}

TEST_F(SharedRegionTest, ARequestWithMemoryOfItsOwnTakesNothingOfTheRing) {
  auto ring = *StagingRing::Create(engine_, 4, kBufferBytes, absl::Milliseconds(1));
  const auto credit = std::make_shared<StagingRing::Credit>();
  StagingRing::Lease before = ring->Acquire({credit}, kAtOnce);
  EXPECT_EQ(before.region(), nullptr);
  auto region = NewRegion(2);
  ring->Lend(*credit, region);
  StagingRing::Lease first = ring->Acquire({credit}, kAtOnce);
  StagingRing::Lease second = ring->Acquire({credit}, kAtOnce);
  ASSERT_TRUE(first && second);
  EXPECT_EQ(first.region(), region.get());
  EXPECT_NE(region->OffsetOf(first.data()), region->OffsetOf(second.data()));
  EXPECT_FALSE(ring->Acquire({credit}, kAtOnce)) << "it has no third buffer";
  EXPECT_EQ(ring->staged_bytes(), static_cast<int64_t>(kBufferBytes));

  first = StagingRing::Lease();
  EXPECT_TRUE(ring->Acquire({credit}, kAtOnce)) << "a buffer came back";
  ring->TakeBack(*credit);
  EXPECT_EQ(ring->Acquire({credit}, kAtOnce).region(), nullptr);
  before = StagingRing::Lease();
  EXPECT_FALSE(ring->AwaitIdle(absl::ZeroDuration())) << "a buffer of the region is on loan";
  region.reset();
  EXPECT_GT(use_->used, 0) << "the memory went before its last buffer came back";
  second = StagingRing::Lease();
  EXPECT_TRUE(ring->AwaitIdle(absl::ZeroDuration()));
  EXPECT_EQ(use_->used, 0);
}

TEST_F(SharedRegionTest, AFrameIsSentByItsPlaceWhileItsConsumerIsThere) {
  auto ring = *StagingRing::Create(engine_, 4, kBufferBytes, absl::Milliseconds(1));
  const auto credit = std::make_shared<StagingRing::Credit>();
  const auto region = NewRegion(1);
  ring->Lend(*credit, region);
  KvFrame frame;
  frame.header = {.lane = 1, .sequence = 2, .layer = 3, .first_block = 4, .num_blocks = 5};
  frame.payload_bytes = 9'999;
  frame.payload = std::make_shared<StagingRing::Lease>(ring->Acquire({credit}, kAtOnce));
  std::memset(frame.payload->data(), 'k', frame.payload_bytes);
  const auto encoded = [&] {
    grpc::ByteBuffer bytes = EncodeEvent(frame);
    ::prefill::v1::PrefillEvent event;
    EXPECT_TRUE(wire::ParseMessage(bytes, event).ok());
    return event.kv_frame();
  };
  region->set_is_read(true);
  ::prefill::v1::KvFrame sent = encoded();
  EXPECT_EQ(sent.shared_offset(), region->OffsetOf(frame.payload->data()));
  EXPECT_EQ(sent.shared_bytes(), 9'999);
  EXPECT_EQ(sent.payload(), "");
  EXPECT_EQ(sent.layer(), 3);
  region->set_is_read(false);
  sent = encoded();
  EXPECT_EQ(sent.shared_bytes(), 0);
  EXPECT_EQ(sent.payload(), std::string(9'999, 'k'));
  ring->TakeBack(*credit);
}

}  // namespace
}  // namespace prefilld::server
