#include "proto/wire/frame_codec.h"

#include <algorithm>
#include <random>
#include <string>

#include <gtest/gtest.h>
#include <xxhash.h>

#include "prefill/v1/prefill.pb.h"
#include "prefill/v1/receiver.pb.h"

namespace prefilld::wire {
namespace {

using ::prefill::v1::KvFrame;
using ::prefill::v1::PrefillEvent;
using ::prefill::v1::ReceiveRequest;

std::string BytesOf(const grpc::ByteBuffer& message) {
  std::vector<grpc::Slice> slices;
  EXPECT_TRUE(message.Dump(&slices).ok());
  std::string bytes;
  for (const grpc::Slice& slice : slices) bytes.append(slice.begin(), slice.end());
  return bytes;
}

const FrameHeader kHeader = {.lane = 15,
                             .sequence = 0xffffffffffffffff,
                             .layer = 0xffffffff,
                             .first_block = 0,
                             .num_blocks = 300,
                             .checksum = 0x0123456789abcdef,
                             .sent_at_us = 1234567890123,
                             .layers_computed = 7};

void ExpectSameHeader(const FrameHeader& a, const FrameHeader& b) {
  EXPECT_EQ(a.lane, b.lane);
  EXPECT_EQ(a.sequence, b.sequence);
  EXPECT_EQ(a.layer, b.layer);
  EXPECT_EQ(a.first_block, b.first_block);
  EXPECT_EQ(a.num_blocks, b.num_blocks);
  EXPECT_EQ(a.checksum, b.checksum);
  EXPECT_EQ(a.sent_at_us, b.sent_at_us);
  EXPECT_EQ(a.layers_computed, b.layers_computed);
}

// Tells when the transport lets go of the payload.
struct LentPayload {
  explicit LentPayload(size_t size) : bytes(size, '\0') {
    for (size_t i = 0; i < size; ++i) bytes[i] = static_cast<char>(i * 7);
  }
  grpc::Slice Lend() {
    lent = true;
    const auto give_back = [](void* self) { static_cast<LentPayload*>(self)->lent = false; };
    return grpc::Slice(bytes.data(), bytes.size(), give_back, this);
  }

  std::string bytes;
  bool lent = false;
};

class EncodeFrameTest : public ::testing::TestWithParam<size_t> {
 protected:
  LentPayload payload_{GetParam()};
  grpc::ByteBuffer message_ = EncodeFrame(kHeader, payload_.Lend());
};

TEST_P(EncodeFrameTest, WritesAnOrdinaryProtobufMessageOfEitherKind) {
  const std::string bytes = BytesOf(message_);
  PrefillEvent event;
  ASSERT_TRUE(event.ParseFromString(bytes));
  ReceiveRequest receive;
  ASSERT_TRUE(receive.ParseFromString(bytes));
  for (const KvFrame* frame : {&event.kv_frame(), &receive.kv_frame()}) {
    EXPECT_EQ(frame->lane(), kHeader.lane);
    EXPECT_EQ(frame->sequence(), kHeader.sequence);
    EXPECT_EQ(frame->layer(), kHeader.layer);
    EXPECT_EQ(frame->first_block(), kHeader.first_block);
    EXPECT_EQ(frame->num_blocks(), kHeader.num_blocks);
    EXPECT_EQ(frame->checksum(), kHeader.checksum);
    EXPECT_EQ(frame->sent_at_us(), kHeader.sent_at_us);
    EXPECT_EQ(frame->layers_computed(), kHeader.layers_computed);
    EXPECT_EQ(frame->payload(), payload_.bytes);
  }
}

TEST_P(EncodeFrameTest, BorrowsItsPayloadUntilTheMessageGoes) {
  {
    std::vector<grpc::Slice> slices;
    ASSERT_TRUE(message_.Dump(&slices).ok());
    EXPECT_EQ(static_cast<const void*>(slices.back().begin()),
              static_cast<const void*>(payload_.bytes.data()));
  }
  EXPECT_TRUE(payload_.lent);
  message_.Clear();
  EXPECT_FALSE(payload_.lent);
}

TEST_P(EncodeFrameTest, WhatIsEncodedIsParsedBack) {
  const auto parsed = ParseFrame(message_);
  ASSERT_TRUE(parsed.ok() && parsed->has_value());
  ExpectSameHeader(**parsed, kHeader);
  std::vector<uint8_t> scratch;
  const uint8_t* bytes = (*parsed)->payload.Contiguous(scratch);
  EXPECT_EQ(std::string(bytes, bytes + (*parsed)->payload.size()), payload_.bytes);
}

INSTANTIATE_TEST_SUITE_P(PayloadBytes, EncodeFrameTest,
                         ::testing::Values(1, 127, 128, 16383, 16384, 1 << 20));

TEST(MakeReceivedFrame, TakesEveryFieldOfAParsedMessage) {
  grpc::ByteBuffer message = EncodeFrame(kHeader, grpc::Slice("payload"));
  PrefillEvent event;
  ASSERT_TRUE(ParseMessage(message, event).ok());
  const ReceivedFrame frame = MakeReceivedFrame(event.kv_frame());
  ExpectSameHeader(frame, kHeader);
  EXPECT_EQ(frame.payload.size(), 7);
}

TEST(Checksum, IsXxh3) {
  // This is XXH3_64bits of the empty input, from its specification.
  EXPECT_EQ(Checksum("", 0), 0x2d06800538d394c2u);
}

// Cuts the bytes into slices of at most `slice_bytes`.
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
    EXPECT_EQ(frame.payload.Checksum(), frame.checksum);
    std::vector<uint8_t> scratch;
    const uint8_t* bytes = frame.payload.Contiguous(scratch);
    EXPECT_EQ(std::string(bytes, bytes + frame.payload.size()), event.kv_frame().payload());
  }
}

TEST(ParseFrame, PartsOfThePayloadLieWhereItArrived) {
  const std::string payload = Event().kv_frame().payload();
  std::mt19937 random(1);
  for (int round = 0; round < 100; ++round) {
    grpc::ByteBuffer buffer = Cut(Event().SerializeAsString(), 1 + random() % payload.size());
    const auto parsed = ParseFrame(buffer);
    const FramePayload& arrived = (*parsed)->payload;
    const size_t offset = random() % (payload.size() + 1);
    const size_t size = random() % (payload.size() - offset + 1);
    std::string part;
    for (const auto& piece : arrived.Part(offset, size)) {
      EXPECT_TRUE(std::any_of(arrived.pieces().begin(), arrived.pieces().end(),
                              [&piece](const auto& whole) {
                                return piece.begin() >= whole.begin() && piece.end() <= whole.end();
                              }))
          << "it was copied";
      part.append(piece.begin(), piece.end());
    }
    EXPECT_EQ(part, payload.substr(offset, size)) << offset << " " << size;
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
  ReceiveRequest request;
  *request.mutable_kv_frame() = Event().kv_frame();
  grpc::ByteBuffer buffer = Cut(request.SerializeAsString(), 64);
  const auto parsed = ParseFrame(buffer);
  ASSERT_TRUE(parsed.ok() && parsed->has_value());
  EXPECT_EQ((*parsed)->payload.Checksum(), (*parsed)->checksum);
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

  // The two halves of a frame are merged by protobuf, which is legal, though odd.
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
  // The frame's length is right, and the payload's is not.
  std::string wrong = bytes;
  const size_t payload_length = bytes.size() - 1000 - 2;
  wrong[payload_length] = static_cast<char>(0xff);
  grpc::ByteBuffer buffer = Cut(wrong, 100);
  EXPECT_EQ(ParseFrame(buffer).status().code(), absl::StatusCode::kDataLoss);
}

grpc::ByteBuffer FrameOf(const std::string& fields) {
  return Cut("\x1a" + std::string(1, static_cast<char>(fields.size())) + fields, 100);
}

// The other parser would read other fields, or none: both must refuse.
TEST(ParseFrame, RefusesTheTagsAndLengthsThatProtobufRefuses) {
  using std::string_literals::operator""s;
  for (const std::string& fields : {
           "\x88\x80\x80\x80\x80\x01\x05"s,          // the tag of `lane`, and a bit above 32
           "\xa8\x80\x80\x80\x80\x80\x80\x01\x05"s,  // that of an unknown field
           "\x7a\x80\x80\x80\x80\x10"s,              // a payload of 2^32 bytes
           "\x7a\x81\x80\x80\x80\x80\x00x"s,         // of one byte, in six digits
           "\xa2\x06\x80\x80\x80\x80\x80\x20"s,      // an unknown field of 2^40 bytes
       }) {
    grpc::ByteBuffer buffer = FrameOf(fields);
    EXPECT_EQ(ParseFrame(buffer).status().code(), absl::StatusCode::kDataLoss);
    PrefillEvent event;
    EXPECT_FALSE(ParseMessage(buffer, event).ok());
  }
}

TEST(ParseFrame, SkipsFieldsOfLaterVersions) {
  grpc::ByteBuffer buffer = FrameOf("\xa0\x06\x05\xa2\x06\x02zz\x08\x03");
  const auto parsed = ParseFrame(buffer);
  ASSERT_TRUE(parsed.ok() && parsed->has_value());
  EXPECT_EQ((*parsed)->lane, 3);
}

}  // namespace
}  // namespace prefilld::wire
