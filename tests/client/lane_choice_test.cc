#include "client/lane_choice.h"

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "client/prefill_client.h"
#include "grpcpp/server_context.h"
#include "tests/client/scripted_server.h"

namespace prefilld::client {
namespace {

namespace v1 = ::prefill::v1;

TEST(LaneChoice, LargeKvGetsFourLanes) {
  EXPECT_EQ(ChooseLanes(0), 1u) << "nobody knows how much it is";
  EXPECT_EQ(ChooseLanes(kBytesForManyLanes - 1), 1u);
  EXPECT_EQ(ChooseLanes(kBytesForManyLanes), 4u);
  EXPECT_EQ(ChooseLanes(uint64_t{1} << 40), 4u);
}

TEST(LaneChoice, KvIsAsLargeAsTheModelAndTheWishSay) {
  v1::ServerInfo info;
  info.set_num_layers(32);
  info.set_num_kv_heads(8);
  info.set_head_dim(128);
  info.set_native_dtype(v1::DTYPE_BF16);
  v1::KvLayoutRequest wish;
  EXPECT_EQ(KvBytesPerToken(info, wish), 131072u) << "Llama-3.1-8B";
  wish.set_num_heads(2);
  EXPECT_EQ(KvBytesPerToken(info, wish), 32768u);
  wish.set_dtype(v1::DTYPE_FP32);
  EXPECT_EQ(KvBytesPerToken(info, wish), 65536u);
  wish.set_dtype(v1::DTYPE_FP8_E4M3);
  EXPECT_EQ(KvBytesPerToken(info, wish), 16384u + 2 * 32 * 2 * 4) << "a scale for each head";
  wish.set_scales(v1::KV_SCALES_PER_BLOCK);
  EXPECT_EQ(KvBytesPerToken(info, wish), 16384u + 2 * 32 * 2 * 4 / 16) << "for each block of 16";

  info.set_num_kv_heads(0xffffffff);
  info.set_head_dim(0xffffffff);
  EXPECT_EQ(KvBytesPerToken(info, {}), 0u) << "no model is so";
  info.set_num_kv_heads(8);
  info.set_head_dim(128);
  wish.set_block_tokens(0xffffffff);
  EXPECT_EQ(KvBytesPerToken(info, wish), 0u) << "the server refuses such blocks";
  wish.clear_block_tokens();

  EXPECT_EQ(TokensToCome({}, 1000), 1000u);
  wish.set_first_block(2);
  EXPECT_EQ(TokensToCome(wish, 1000), 968u);
  wish.set_block_tokens(128);
  EXPECT_EQ(TokensToCome(wish, 1000), 744u);
  wish.set_first_block(8);
  EXPECT_EQ(TokensToCome(wish, 1000), 0u) << "the last block is not full";
}

TEST(LaneChoice, AnAddressOfOneMachineIsOne) {
  for (const char* address : {"127.0.0.1:50051", "[::1]:50051", "unix:/run/prefilld.sock",
                              "localhost:50051", "no-such-host.invalid:50051"}) {
    EXPECT_FALSE(StandsForSeveral(address)) << address;
  }
}

struct IgnoringSink : KvSink {
  absl::Status OnAccepted(const v1::Accepted&) override { return absl::OkStatus(); }
  absl::Status OnProgress(const v1::Progress&) override { return absl::OkStatus(); }
  absl::Status OnFrame(const wire::ReceivedFrame&) override { return absl::OkStatus(); }
};

// A server that notes how many lanes it is asked for. It refuses more than it has, serves
// SmallRequest on one lane, and breaks off what else it is asked.
class LanesAskedFor : public ::testing::Test {
 protected:
  std::vector<uint32_t> Ask(const v1::PrefillRequest& request, uint64_t kv_bytes_per_token) {
    IgnoringSink sink;
    const PrefillCallOptions options = {.resumable = is_resumable_,
                                        .kv_bytes_per_token = kv_bytes_per_token};
    status_ = client_->Prefill(request, sink, options).status();
    absl::MutexLock lock(&mu_);
    return std::exchange(asked_, {});
  }

  grpc::Status Serve(grpc::ServerContext& context, const v1::PrefillRequest& request,
                     PrefillWriter& writer) {
    absl::MutexLock lock(&mu_);
    asked_.push_back(request.num_lanes());
    keys_.push_back(request.resume_key());
    if (request.num_lanes() > most_) {
      return grpc::Status(grpc::StatusCode::PERMISSION_DENIED, "num_lanes");
    }
    if (request.token_ids_size() != SmallRequest().token_ids_size()) {
      return grpc::Status(grpc::StatusCode::ABORTED, "enough");
    }
    const bool on_lanes = has_lanes_elsewhere_ && request.num_lanes() > 1;
    writer.Write(
        AcceptedEvent(SmallLayout(), on_lanes ? static_cast<int>(request.num_lanes()) : 1));
    if (on_lanes) return AwaitCancel(context);
    for (uint32_t layer = 0; layer < 3; ++layer) {
      writer.Write(FrameEvent(SmallLayout(), 0, layer, layer, 0, 3));
    }
    writer.Write(ResultEvent({3}));
    return grpc::Status::OK;
  }

  static grpc::Status AwaitCancel(grpc::ServerContext& context) {
    while (!context.IsCancelled()) absl::SleepFor(absl::Milliseconds(2));
    return grpc::Status::CANCELLED;
  }

  absl::Mutex mu_;
  uint32_t most_ = 16;
  bool has_lanes_elsewhere_ = false;
  bool is_resumable_ = false;
  std::vector<uint32_t> asked_;
  std::vector<std::string> keys_;  // of all calls
  absl::Status status_;            // of the latest call
  ScriptedServer server_{[this](grpc::ServerContext& context, const v1::PrefillRequest& request,
                                PrefillWriter& writer) { return Serve(context, request, writer); },
                         [](const v1::AttachLaneRequest&, PrefillWriter&) {
                           return grpc::Status(grpc::StatusCode::NOT_FOUND,
                                               "no such running request with lanes");
                         }};
  const std::unique_ptr<PrefillClient> client_ =
      PrefillClient::Create({.address = server_.address()}).value();
};

v1::PrefillRequest Request(int num_tokens, uint32_t num_lanes = 0) {
  v1::PrefillRequest request;
  request.mutable_token_ids()->Resize(num_tokens, 1);
  request.set_num_lanes(num_lanes);
  return request;
}

TEST_F(LanesAskedFor, DependOnTheKvUnlessTheCallerNamesThem) {
  const uint64_t bytes_per_token = kBytesForManyLanes / 64;
  EXPECT_EQ(Ask(Request(64), bytes_per_token), std::vector<uint32_t>{4});
  EXPECT_EQ(Ask(Request(63), bytes_per_token), std::vector<uint32_t>{1});
  EXPECT_EQ(Ask(Request(64), 0), std::vector<uint32_t>{1}) << "nothing is known of this server";
  EXPECT_EQ(Ask(Request(64, 2), bytes_per_token), std::vector<uint32_t>{2});
  v1::PrefillRequest pushed = Request(64);
  pushed.mutable_deliver_to()->set_address("127.0.0.1:1");
  EXPECT_EQ(Ask(pushed, bytes_per_token), std::vector<uint32_t>{0}) << "the server chooses";
}

TEST_F(LanesAskedFor, FollowWhatTheServerAcceptedBefore) {
  const uint64_t num_tokens = kBytesForManyLanes / KvBytesPerToken(SmallLayout()) + 1;
  EXPECT_EQ(Ask(Request(num_tokens), 0), std::vector<uint32_t>{1});
  EXPECT_EQ(Ask(SmallRequest(), 0), std::vector<uint32_t>{1});
  EXPECT_TRUE(status_.ok()) << status_;
  EXPECT_EQ(Ask(Request(num_tokens), 0), std::vector<uint32_t>{4});
}

TEST_F(LanesAskedFor, AreOneOnceLanesEndedAtAnotherServer) {
  has_lanes_elsewhere_ = true;
  EXPECT_EQ(Ask(SmallRequest(), kBytesForManyLanes), std::vector<uint32_t>{4});
  EXPECT_EQ(status_.code(), absl::StatusCode::kNotFound) << status_;
  EXPECT_EQ(Ask(SmallRequest(), kBytesForManyLanes), std::vector<uint32_t>{1});
  EXPECT_TRUE(status_.ok()) << status_;
}

// A server is told that a resumable request is cancelled once it was refused. That may come when
// the same request is there again, with fewer lanes.
TEST_F(LanesAskedFor, AreAskedForWithAKeyOfTheirOwnEachTime) {
  most_ = 1;
  is_resumable_ = true;
  EXPECT_EQ(Ask(SmallRequest(), kBytesForManyLanes), (std::vector<uint32_t>{4, 1}));
  EXPECT_TRUE(status_.ok()) << status_;
  EXPECT_EQ(Ask(SmallRequest(), kBytesForManyLanes), std::vector<uint32_t>{1}) << "asked again";
  absl::MutexLock lock(&mu_);
  ASSERT_EQ(keys_.size(), 3u);
  EXPECT_EQ(keys_[0].size(), 32u);
  EXPECT_EQ(keys_[1].size(), 32u);
  EXPECT_NE(keys_[0], keys_[1]);
}

TEST_F(LanesAskedFor, AreOneWhereMoreAreRefusedThatNobodyNamed) {
  most_ = 2;
  EXPECT_EQ(Ask(Request(64), kBytesForManyLanes), (std::vector<uint32_t>{4, 1}));
  EXPECT_EQ(Ask(Request(64, 4), kBytesForManyLanes), std::vector<uint32_t>{4});
}

}  // namespace
}  // namespace prefilld::client
