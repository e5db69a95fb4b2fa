#include "server/grpc_encoding.h"

#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <grpcpp/impl/codegen/proto_utils.h>
#include <gtest/gtest.h>

#include "prefill/v1/receiver.pb.h"
#include "tests/server/fake_engine.h"

namespace prefilld::server {
namespace {

namespace v1 = ::prefill::v1;

template <typename Proto>
Proto Decode(grpc::ByteBuffer buffer) {
  Proto proto;
  EXPECT_TRUE(grpc::SerializationTraits<Proto>::Deserialize(&buffer, &proto).ok());
  return proto;
}

class GrpcEncodingTest : public ::testing::Test {
 protected:
  KvFrame NewFrame() {
    KvFrame frame;
    frame.header.layer = 7;
    frame.payload = std::make_shared<StagingRing::Lease>(
        ring_->Acquire({std::make_shared<StagingRing::Credit>()}, [] { return true; }));
    frame.payload_bytes = 100;
    std::memset(frame.payload->data(), 'k', frame.payload_bytes);
    return frame;
  }

  FakeEngine engine_{FakeEngineOptions()};
  std::unique_ptr<StagingRing> ring_ = *StagingRing::Create(engine_, 2, 4096);
};

TEST_F(GrpcEncodingTest, AFrameBorrowsTheStagingBufferUntilTheMessageGoes) {
  KvFrame frame = NewFrame();
  const void* const data = frame.payload->data();
  {
    const grpc::ByteBuffer message = EncodeEvent(std::move(frame));
    std::vector<grpc::Slice> slices;
    ASSERT_TRUE(message.Dump(&slices).ok());
    EXPECT_EQ(static_cast<const void*>(slices.back().begin()), data);
    EXPECT_EQ(slices.back().size(), 100);
    EXPECT_EQ(ring_->staged_bytes(), 4096);
  }
  EXPECT_EQ(ring_->staged_bytes(), 0);
}

TEST_F(GrpcEncodingTest, AFrameIsTheSameOnBothStreams) {
  const auto event = Decode<v1::PrefillEvent>(EncodeEvent(NewFrame()));
  const auto request = Decode<v1::ReceiveRequest>(EncodeReceiveRequest(NewFrame(), {}));
  EXPECT_EQ(event.kv_frame().layer(), 7u);
  EXPECT_EQ(event.kv_frame().payload(), std::string(100, 'k'));
  EXPECT_EQ(request.kv_frame().SerializeAsString(), event.kv_frame().SerializeAsString());
}

TEST_F(GrpcEncodingTest, APushIsOpenedInPlaceOfAcceptedAndEndedByTheResult) {
  v1::PrefillEvent accepted, last;
  accepted.mutable_accepted();
  v1::ReceiveOpen opening;
  opening.set_transfer_id("transfer");
  last.mutable_result()->set_num_tokens(9);
  const auto open = Decode<v1::ReceiveRequest>(EncodeReceiveRequest(accepted, opening));
  EXPECT_EQ(open.open().transfer_id(), "transfer");
  const auto end = Decode<v1::ReceiveRequest>(EncodeReceiveRequest(last, opening));
  EXPECT_EQ(end.result().num_tokens(), 9u);
}

}  // namespace
}  // namespace prefilld::server
