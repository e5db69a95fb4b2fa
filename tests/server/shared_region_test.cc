// Tests the memory that a consumer brings: what is refused, what a consumer that has the descriptor
// can still do, and how frames lie there.
#include "server/shared_region.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <string>
#include <utility>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "proto/wire/frame_codec.h"
#include "server/grpc_encoding.h"
#include "server/staging_ring.h"
#include "tests/server/fake_engine.h"

namespace prefilld::server {
namespace {

using ::testing::HasSubstr;

constexpr size_t kBuffer = 16'384;
constexpr size_t kBytes = 4 * kBuffer;
constexpr auto kAtOnce = [] { return true; };

wire::Descriptor Memfd(unsigned flags = MFD_CLOEXEC | MFD_ALLOW_SEALING) {
  return wire::Descriptor(memfd_create("prefilld-kv", flags));
}

void Seal(const wire::Descriptor& memory, int seals = F_SEAL_SHRINK | F_SEAL_GROW) {
  EXPECT_EQ(fcntl(memory.get(), F_ADD_SEALS, seals), 0);
}

class SharedRegionTest : public ::testing::Test {
 protected:
  absl::StatusOr<std::shared_ptr<SharedRegion>> Map(wire::Descriptor memory,
                                                    uint64_t bytes = kBytes) {
    auto share = SharedMemoryUse::Take(use_, /*tenant=*/0, static_cast<int64_t>(bytes));
    EXPECT_TRUE(share.ok()) << share.status();
    return SharedRegion::Map(engine_, *std::move(share), std::move(memory), bytes, kBuffer);
  }
  std::shared_ptr<SharedRegion> NewRegion(size_t bytes = kBytes) {
    auto region = Map(*wire::MakeSealedMemory(bytes), bytes);
    EXPECT_TRUE(region.ok()) << region.status();
    return *std::move(region);
  }
  void ExpectRefused(wire::Descriptor memory, const char* reason, uint64_t bytes = kBytes) {
    const auto region = Map(std::move(memory), bytes);
    EXPECT_TRUE(absl::IsInvalidArgument(region.status())) << region.status();
    EXPECT_THAT(region.status().message(), HasSubstr(reason));
    EXPECT_EQ(use_->total().bytes, 0) << "a refusal is charged";
  }

  FakeEngine engine_{FakeEngineOptions()};
  const std::shared_ptr<SharedMemoryUse> use_ =
      std::make_shared<SharedMemoryUse>(SharedMemoryUse::Limits{1 << 20, 8});
};

TEST_F(SharedRegionTest, MemoryThatCouldHarmTheServerIsRefused) {
  {
    wire::Descriptor unsealed = Memfd();
    ASSERT_EQ(fallocate(unsealed.get(), 0, 0, kBytes), 0);
    ExpectRefused(std::move(unsealed), "F_SEAL_SHRINK and F_SEAL_GROW");
  }
  for (const int half : {F_SEAL_SHRINK, F_SEAL_GROW}) {
    wire::Descriptor memory = Memfd();
    ASSERT_EQ(fallocate(memory.get(), 0, 0, kBytes), 0);
    Seal(memory, half);
    ExpectRefused(std::move(memory), "seals 0x");
  }
  for (const int more : {F_SEAL_WRITE, F_SEAL_FUTURE_WRITE, F_SEAL_SEAL}) {
    wire::Descriptor memory = *wire::MakeSealedMemory(kBytes);
    Seal(memory, more);
    ExpectRefused(std::move(memory), "seals 0x");
  }
  {
    wire::Descriptor sparse = Memfd();
    ASSERT_EQ(ftruncate(sparse.get(), kBytes), 0);
    Seal(sparse);
    ExpectRefused(std::move(sparse), "of 65536 bytes 0 are allocated");
  }
  {
    wire::Descriptor holed = Memfd();
    ASSERT_EQ(fallocate(holed.get(), 0, 0, kBytes), 0);
    ASSERT_EQ(fallocate(holed.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 4096, 4096), 0);
    Seal(holed);
    ExpectRefused(std::move(holed), "61440 are allocated");
  }
  {
    wire::Descriptor behind = Memfd();
    ASSERT_EQ(ftruncate(behind.get(), kBytes), 0);
    ASSERT_EQ(fallocate(behind.get(), FALLOC_FL_KEEP_SIZE, kBytes, kBytes), 0);
    struct stat facts = {};
    ASSERT_EQ(fstat(behind.get(), &facts), 0);
    ASSERT_EQ(facts.st_blocks * 512, static_cast<int64_t>(kBytes)) << "no page lies behind the end";
    Seal(behind);
    ExpectRefused(std::move(behind), "of 65536 bytes 0 are allocated");
  }
  ExpectRefused(*wire::MakeSealedMemory(kBytes - 4096), "has 61440 bytes; attach says 65536");
  ExpectRefused(*wire::MakeSealedMemory(kBytes + 4096), "has 69632 bytes; attach says 65536");
  ExpectRefused(*wire::MakeSealedMemory(kBuffer - 4096), "a frame of this server takes 16384",
                kBuffer - 4096);
}

TEST_F(SharedRegionTest, MemoryThatCanNeverBeExecutedIsTaken) {
  constexpr unsigned kNoExecSeal = 0x0008;  // MFD_NOEXEC_SEAL
  if (!Memfd(MFD_CLOEXEC | kNoExecSeal).valid()) GTEST_SKIP() << "the kernel is older than 6.3";
  wire::Descriptor memory = *wire::MakeSealedMemory(kBytes);
  struct stat facts = {};
  ASSERT_EQ(fstat(memory.get(), &facts), 0);
  EXPECT_EQ(facts.st_mode & 0111, 0u);
  EXPECT_NE(fchmod(memory.get(), 0777), 0);
  EXPECT_TRUE(Map(std::move(memory)).ok());
}

TEST_F(SharedRegionTest, WhatIsNoMemfdIsRefused) {
  int ends[2];
  ASSERT_EQ(pipe(ends), 0);
  const wire::Descriptor read_end(ends[0]);
  ExpectRefused(wire::Descriptor(ends[1]), "no memfd");

  const std::string path = std::filesystem::temp_directory_path() / "prefilld-region-XXXXXX";
  std::string name = path;
  wire::Descriptor file(mkstemp(name.data()));
  ASSERT_TRUE(file.valid());
  unlink(name.c_str());
  ASSERT_EQ(posix_fallocate(file.get(), 0, kBytes), 0);
  ExpectRefused(std::move(file), "descriptor: ");  // on a disk, or in a tmpfs, which is sealed

  const wire::Descriptor memory = *wire::MakeSealedMemory(kBytes);
  const std::string itself = "/proc/self/fd/" + std::to_string(memory.get());
  ExpectRefused(wire::Descriptor(open(itself.c_str(), O_RDONLY | O_CLOEXEC)),
                "not open for reading and writing");
  ExpectRefused(wire::Descriptor(open("/dev/null", O_RDWR | O_CLOEXEC)), "no memfd");
}

// A page that is gone would be made again by the server's write, and be the server's.
TEST_F(SharedRegionTest, WhoeverHasTheDescriptorCanNeitherTakePagesAwayNorResizeIt) {
  const wire::Descriptor memory = *wire::MakeSealedMemory(kBytes);
  const int fd = memory.get();
  void* const before = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  ASSERT_NE(before, MAP_FAILED);
  ASSERT_TRUE(Map(wire::Descriptor(fcntl(fd, F_DUPFD_CLOEXEC, 0))).ok());
  EXPECT_EQ(ftruncate(fd, 0), -1);
  EXPECT_EQ(ftruncate(fd, 2 * kBytes), -1);
  EXPECT_EQ(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 4096), -1);
  EXPECT_EQ(madvise(before, 4096, MADV_REMOVE), -1);
  EXPECT_EQ(mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0), MAP_FAILED);
  struct stat facts = {};
  ASSERT_EQ(fstat(fd, &facts), 0);
  EXPECT_EQ(facts.st_blocks * 512, static_cast<int64_t>(kBytes));
  std::memset(before, 1, kBytes);  // a mapping of the consumer's goes on
  munmap(before, kBytes);
}

TEST_F(SharedRegionTest, TheDescriptorIsClosedAndTheMemoryIsTheConsumersAlone) {
  const wire::Descriptor memory = *wire::MakeSealedMemory(kBytes);
  const int lent = fcntl(memory.get(), F_DUPFD_CLOEXEC, 0);
  auto region = *Map(wire::Descriptor(lent));
  EXPECT_EQ(fcntl(lent, F_GETFD), -1) << "the descriptor is open";
  EXPECT_EQ(use_->total().bytes, static_cast<int64_t>(kBytes));
  EXPECT_EQ(use_->total().attachments, 1);
  region.reset();
  EXPECT_EQ(use_->total().bytes, 0);
  EXPECT_EQ(use_->total().attachments, 0);
}

TEST_F(SharedRegionTest, ARequestWithMemoryOfItsOwnTakesNothingOfTheRing) {
  auto ring = *StagingRing::Create(engine_, 4, kBuffer, absl::Milliseconds(1));
  const auto credit = std::make_shared<StagingRing::Credit>();
  StagingRing::Lease before = ring->Acquire({credit}, kAtOnce);
  EXPECT_EQ(before.region(), nullptr);
  auto region = NewRegion(2 * kBuffer);
  ring->Lend(*credit, region);
  StagingRing::Lease first = ring->Acquire({credit}, kAtOnce);
  StagingRing::Lease second = ring->Acquire({credit}, kAtOnce);
  ASSERT_TRUE(first && second);
  EXPECT_EQ(first.region(), region.get());
  EXPECT_NE(region->OffsetOf(first.data()), region->OffsetOf(second.data()));
  EXPECT_FALSE(ring->Acquire({credit}, kAtOnce)) << "it has no third buffer";
  EXPECT_EQ(ring->staged_bytes(), static_cast<int64_t>(kBuffer));

  first = StagingRing::Lease();
  EXPECT_TRUE(ring->Acquire({credit}, kAtOnce)) << "a buffer came back";
  ring->TakeBack(*credit);
  EXPECT_EQ(ring->Acquire({credit}, kAtOnce).region(), nullptr);
  before = StagingRing::Lease();
  EXPECT_FALSE(ring->AwaitIdle(absl::ZeroDuration())) << "a buffer of the region is on loan";
  region.reset();
  EXPECT_GT(use_->total().bytes, 0) << "the memory went before its last buffer came back";
  second = StagingRing::Lease();
  EXPECT_TRUE(ring->AwaitIdle(absl::ZeroDuration()));
  EXPECT_EQ(use_->total().bytes, 0);
}

// A buffer that the request before has not given back is not written for the next.
TEST_F(SharedRegionTest, TheNextRequestHasWhatTheOneBeforeHasGivenBack) {
  auto ring = *StagingRing::Create(engine_, 4, kBuffer, absl::Milliseconds(1));
  auto region = NewRegion(2 * kBuffer);
  const auto first = std::make_shared<StagingRing::Credit>();
  ring->Lend(*first, region);
  StagingRing::Lease left = ring->Acquire({first}, kAtOnce);
  ring->TakeBack(*first);
  EXPECT_FALSE(ring->AwaitBack(*region, absl::ZeroDuration()));
  const auto next = std::make_shared<StagingRing::Credit>();
  ring->Lend(*next, region);
  {
    StagingRing::Lease other = ring->Acquire({next}, kAtOnce);
    ASSERT_TRUE(other);
    EXPECT_NE(other.data(), left.data());
    EXPECT_FALSE(ring->Acquire({next}, kAtOnce)) << "the other one is on loan";
  }
  left = StagingRing::Lease();
  EXPECT_TRUE(ring->AwaitBack(*region, absl::ZeroDuration()));
  ring->TakeBack(*next);
}

TEST_F(SharedRegionTest, AFrameIsSentByItsPlaceWhileItsConsumerIsThere) {
  auto ring = *StagingRing::Create(engine_, 4, kBuffer, absl::Milliseconds(1));
  const auto credit = std::make_shared<StagingRing::Credit>();
  const auto region = NewRegion(kBuffer);
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
  credit->set_is_read_in_place(true);
  ::prefill::v1::KvFrame sent = encoded();
  EXPECT_EQ(sent.shared_offset(), region->OffsetOf(frame.payload->data()));
  EXPECT_EQ(sent.shared_bytes(), 9'999);
  EXPECT_EQ(sent.payload(), "");
  EXPECT_EQ(sent.layer(), 3);
  credit->set_is_read_in_place(false);
  sent = encoded();
  EXPECT_EQ(sent.shared_bytes(), 0);
  EXPECT_EQ(sent.payload(), std::string(9'999, 'k'));
  ring->TakeBack(*credit);
}

}  // namespace
}  // namespace prefilld::server
