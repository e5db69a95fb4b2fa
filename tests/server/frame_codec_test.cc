#include "server/frame_codec.h"

#include <cstring>

#include <grpcpp/impl/codegen/proto_utils.h>
#include <gtest/gtest.h>

#include "prefill/v1/prefill.pb.h"
#include "prefill/v1/receiver.pb.h"
#include "tests/server/fake_engine.h"

namespace prefilld::server {
namespace {

namespace v1 = ::prefill::v1;

constexpr auto kNever = [] { return false; };

class FrameCodec : public ::testing::TestWithParam<size_t> {
 protected:
  FakeEngine engine_{FakeEngineOptions()};
  std::unique_ptr<StagingRing> ring_ = *StagingRing::Create(engine_, 2, 1 << 20);
};

TEST_P(FrameCodec, WritesAnOrdinaryProtobufMessageThatBorrowsItsPayload) {
  const size_t payload_bytes = GetParam();
  FrameHeader header{.lane = 15,
                     .sequence = 0xffffffffffffffff,
                     .layer = 0xffffffff,
                     .first_block = 0,
                     .num_blocks = 300,
                     .checksum = 0x0123456789abcdef,
                     .sent_at_us = 1234567890123,
                     .layers_computed = 7};
  auto lease = ring_->Acquire({std::make_shared<StagingRing::Credit>()}, kNever);
  for (size_t i = 0; i < payload_bytes; ++i) lease.data()[i] = static_cast<std::byte>(i * 7);
  const std::string payload(reinterpret_cast<const char*>(lease.data()), payload_bytes);
  const std::byte* const staged = lease.data();

  grpc::ByteBuffer buffer = EncodeFrame(header, std::move(lease), payload_bytes);
  EXPECT_EQ(ring_->staged_bytes(), 1 << 20);
  std::vector<grpc::Slice> slices;
  ASSERT_TRUE(buffer.Dump(&slices).ok());
  EXPECT_EQ(static_cast<const void*>(slices.back().begin()), static_cast<const void*>(staged));
  slices.clear();

  grpc::ByteBuffer copy(buffer);
  v1::PrefillEvent event;
  ASSERT_TRUE(grpc::SerializationTraits<v1::PrefillEvent>::Deserialize(&copy, &event).ok());
  copy = buffer;
  v1::ReceiveRequest receive;
  ASSERT_TRUE(grpc::SerializationTraits<v1::ReceiveRequest>::Deserialize(&copy, &receive).ok());
  for (const v1::KvFrame* frame : {&event.kv_frame(), &receive.kv_frame()}) {
    EXPECT_EQ(frame->lane(), header.lane);
    EXPECT_EQ(frame->sequence(), header.sequence);
    EXPECT_EQ(frame->layer(), header.layer);
    EXPECT_EQ(frame->first_block(), header.first_block);
    EXPECT_EQ(frame->num_blocks(), header.num_blocks);
    EXPECT_EQ(frame->checksum(), header.checksum);
    EXPECT_EQ(frame->sent_at_us(), header.sent_at_us);
    EXPECT_EQ(frame->layers_computed(), header.layers_computed);
    EXPECT_EQ(frame->payload(), payload);
  }
  buffer.Clear();
  EXPECT_EQ(ring_->staged_bytes(), 0);
}

INSTANTIATE_TEST_SUITE_P(PayloadBytes, FrameCodec,
                         ::testing::Values(1, 127, 128, 16383, 16384, 1 << 20));

TEST(Checksum, IsXxh3) {
  // XXH3_64bits of the empty input, from its specification.
  EXPECT_EQ(Checksum("", 0), 0x2d06800538d394c2u);
}

}  // namespace
}  // namespace prefilld::server
