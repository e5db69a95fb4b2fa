#include "client/received_frame.h"

#include <string>

#include "gtest/gtest.h"
#include "prefill/v1/prefill.pb.h"
#include "prefill/v1/receiver.pb.h"
#include "xxhash.h"

namespace prefilld::client {
namespace {

using ::prefill::v1::PrefillEvent;

// As many slices as pieces of at most `slice_bytes`.
grpc::ByteBuffer Cut(const std::string& bytes, size_t slice_bytes) {
  std::vector<grpc::Slice> slices;
  for (size_t i = 0; i < bytes.size(); i += slice_bytes) {
    slices.emplace_back(bytes.substr(i, slice_bytes));
  }
  return grpc::ByteBuffer(slices.data(), slices.size());
}

PrefillEvent Event() {
  PrefillEvent event;
  auto& frame = *event.mutable_kv_frame();
  frame.set_lane(3);
  frame.set_sequence(1ull << 40);
  frame.set_layer(17);
  frame.set_first_block(70000);
  frame.set_num_blocks(5);
  frame.set_sent_at_us(123456789);
  frame.set_layers_computed(18);
  for (int i = 0; i < 1000; ++i) frame.mutable_payload()->push_back(static_cast<char>(i * 37));
  frame.set_checksum(XXH3_64bits(frame.payload().data(), frame.payload().size()));
  return event;
}

TEST(ParseFrame, ReadsEveryFieldHoweverTheBytesAreCut) {
  const PrefillEvent event = Event();
  for (size_t slice_bytes : {1, 2, 7, 50, 999, 100000}) {
    grpc::ByteBuffer buffer = Cut(event.SerializeAsString(), slice_bytes);
    const auto parsed = ParseFrame(buffer);
    ASSERT_TRUE(parsed.ok() && parsed->has_value()) << slice_bytes;
    const ReceivedFrame& frame = **parsed;
    EXPECT_EQ(frame.lane, 3);
    EXPECT_EQ(frame.sequence, 1ull << 40);
    EXPECT_EQ(frame.layer, 17);
    EXPECT_EQ(frame.first_block, 70000);
    EXPECT_EQ(frame.num_blocks, 5);
    EXPECT_EQ(frame.sent_at_us, 123456789);
    EXPECT_EQ(frame.layers_computed, 18);
    EXPECT_EQ(frame.payload.Xxh3(), frame.checksum);
    std::vector<uint8_t> scratch;
    const uint8_t* bytes = frame.payload.Contiguous(scratch);
    EXPECT_EQ(std::string(bytes, bytes + frame.payload.size()), event.kv_frame().payload());
  }
}

TEST(ParseFrame, APayloadInOneSliceIsNotCopied) {
  const std::string bytes = Event().SerializeAsString();
  grpc::ByteBuffer buffer = Cut(bytes, bytes.size());
  const auto parsed = ParseFrame(buffer);
  std::vector<uint8_t> scratch;
  EXPECT_EQ((*parsed)->payload.Contiguous(scratch), (*parsed)->payload.pieces()[0].data());
  EXPECT_TRUE(scratch.empty());
}

TEST(ParseFrame, TheKvReceiversMessageHasTheSameForm) {
  ::prefill::v1::ReceiveRequest request;
  *request.mutable_kv_frame() = Event().kv_frame();
  grpc::ByteBuffer buffer = Cut(request.SerializeAsString(), 64);
  const auto parsed = ParseFrame(buffer);
  ASSERT_TRUE(parsed.ok() && parsed->has_value());
  EXPECT_EQ((*parsed)->payload.Xxh3(), (*parsed)->checksum);
}

TEST(ParseFrame, LeavesOtherMessagesToTheGeneralParser) {
  PrefillEvent progress;
  progress.mutable_progress()->set_layers_computed(2);
  grpc::ByteBuffer buffer = Cut(progress.SerializeAsString(), 100);
  ASSERT_TRUE(ParseFrame(buffer).ok());
  EXPECT_FALSE(ParseFrame(buffer)->has_value());
  PrefillEvent again;
  ASSERT_TRUE(ParseMessage(buffer, again).ok());
  EXPECT_EQ(again.progress().layers_computed(), 2);

  // Two halves of a frame, which protobuf merges: legal, if odd.
  PrefillEvent first, second;
  first.mutable_kv_frame()->set_layer(1);
  second.mutable_kv_frame()->set_lane(2);
  grpc::ByteBuffer merged = Cut(first.SerializeAsString() + second.SerializeAsString(), 100);
  ASSERT_TRUE(ParseFrame(merged).ok());
  EXPECT_FALSE(ParseFrame(merged)->has_value());
}

TEST(ParseFrame, EveryTruncationIsAnErrorOrLeftToTheGeneralParser) {
  const std::string bytes = Event().SerializeAsString();
  for (size_t size = 0; size < 60; ++size) {
    grpc::ByteBuffer buffer = Cut(bytes.substr(0, size), 11);
    const auto parsed = ParseFrame(buffer);
    EXPECT_FALSE(parsed.ok() && parsed->has_value()) << size;
  }
  // The frame's length is right, the payload's is not.
  std::string wrong = bytes;
  const size_t payload_length = bytes.size() - 1000 - 2;
  wrong[payload_length] = static_cast<char>(0xff);
  grpc::ByteBuffer buffer = Cut(wrong, 100);
  EXPECT_EQ(ParseFrame(buffer).status().code(), absl::StatusCode::kDataLoss);
}

}  // namespace
}  // namespace prefilld::client
