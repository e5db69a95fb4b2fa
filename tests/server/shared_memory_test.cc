// Tests KV in shared memory over sockets: what arrives, who is refused, and what a consumer can do
// that does not keep the rules.
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <gmock/gmock.h>

#include "absl/synchronization/mutex.h"
#include "client/prefill_client.h"
#include "client/shared_memory.h"
#include "prefill/v1/shared_memory.pb.h"
#include "proto/wire/packet_socket.h"
#include "server/shared_memory_host.h"
#include "tests/server/server_fixture.h"

namespace prefilld::server {
namespace {

using ::testing::HasSubstr;
using wire::PacketSocket;

constexpr absl::Duration kPatience = absl::Seconds(10);
constexpr int kTokens = 4000;

// Keeps what arrives as messages, payloads included.
class KeepingSink final : public client::KvSink {
 public:
  absl::Status OnAccepted(const v1::Accepted& accepted) override {
    layout = accepted.layout();
    return absl::OkStatus();
  }
  absl::Status OnProgress(const v1::Progress&) override { return absl::OkStatus(); }
  void OnSharedMemory(const absl::Status& status) override { attached = status; }
  absl::Status OnFrame(const wire::ReceivedFrame& frame) override {
    v1::KvFrame kept;
    kept.set_lane(frame.lane);
    kept.set_sequence(frame.sequence);
    kept.set_layer(frame.layer);
    kept.set_first_block(frame.first_block);
    kept.set_num_blocks(frame.num_blocks);
    kept.set_checksum(frame.checksum);
    kept.set_layers_computed(frame.layers_computed);
    kept.mutable_payload()->resize(frame.payload.size());
    frame.payload.CopyTo(reinterpret_cast<uint8_t*>(kept.mutable_payload()->data()));
    absl::MutexLock lock(&mu);
    frames.push_back(std::move(kept));
    return absl::OkStatus();
  }

  v1::KvLayout layout;
  absl::Status attached = absl::UnknownError("not told");
  absl::Mutex mu;
  std::vector<v1::KvFrame> frames;  // guarded by mu while the call runs
};

// A consumer that speaks for itself, without the client library.
struct Visitor {
  explicit Visitor(const v1::Accepted& accepted, size_t address = 0)
      : socket(
            *PacketSocket::Connect(accepted.shared_memory().sockets(static_cast<int>(address)))) {}

  v1::SharedMemoryAttached Attach(const v1::Accepted& accepted, const std::string& key) {
    v1::SharedMemoryRequest request;
    request.mutable_attach()->set_request_id(accepted.request_id());
    request.mutable_attach()->set_key(key);
    EXPECT_TRUE(socket.Send(request, kPatience).ok());
    v1::SharedMemoryAttached answer;
    const absl::Status received = socket.Receive(answer, kPatience, &memory);
    EXPECT_TRUE(received.ok()) << received;
    return answer;
  }
  v1::SharedMemoryAttached Attach(const v1::Accepted& accepted) {
    return Attach(accepted, accepted.shared_memory().key());
  }
  void Map() {
    v1::SharedMemoryRequest request;
    request.mutable_mapped();
    EXPECT_TRUE(socket.Send(request, kPatience).ok());
  }
  void Acknowledge(uint32_t lane, uint64_t received) {
    v1::SharedMemoryRequest request;
    request.mutable_receipt()->set_lane(lane);
    request.mutable_receipt()->set_received(received);
    socket.Send(request, kPatience).IgnoreError();  // the server may have gone first
  }
  bool IsClosed() {
    v1::SharedMemoryAttached nothing;
    return absl::IsUnavailable(socket.Receive(nothing, kPatience));
  }

  PacketSocket socket;
  wire::Descriptor memory;
};

class SharedMemoryTest : public ServerFixture {
 protected:
  SharedMemoryTest() {
    engine_options_.num_layers = 6;
    options_.shared_memory_bytes = int64_t{1} << 30;
  }

  void MakeClient() {
    auto client = client::PrefillClient::Create({.address = address()});
    ASSERT_TRUE(client.ok()) << client.status();
    client_ = *std::move(client);
  }
  double Visitors(const std::string& result) const {
    return Metric("prefilld_shared_memory_connections_total{result=\"" + result + "\"}");
  }
  double Bytes(const std::string& transport) const {
    return Metric("prefilld_kv_transport_bytes_total{transport=\"" + transport + "\"}");
  }
  double Ended(const std::string& outcome) const {
    return Metric("prefilld_requests_total{outcome=\"" + outcome + "\"}");
  }
  bool MemoryIsFree() {
    return Eventually([this] { return Metric("prefilld_shared_memory_bytes") == 0; });
  }
  // Opens a call that computes no layer before the test says so.
  std::unique_ptr<OpenStream> Open(v1::Accepted& accepted) {
    engine_->HoldAfter(0);
    auto stream = std::make_unique<OpenStream>(*stub_, PromptOf(kTokens, "shared"));
    accepted = stream->ReadUntil(v1::PrefillEvent::kAccepted).accepted();
    return stream;
  }

  std::unique_ptr<client::PrefillClient> client_;
};

// The parameters are lanes, and whether the request is resumable.
class Arrival : public SharedMemoryTest,
                public ::testing::WithParamInterface<std::pair<uint32_t, bool>> {};

TEST_P(Arrival, BringsTheWholeCache) {
  StartServer();
  MakeClient();
  v1::PrefillRequest request = PromptOf(kTokens);
  request.set_num_lanes(GetParam().first);
  engine_->HoldAfter(0);  // so that no frame is packed before the memory is there
  KeepingSink sink;
  absl::StatusOr<v1::PrefillResult> result;
  std::thread caller(
      [&] { result = client_->Prefill(request, sink, {.resumable = GetParam().second}); });
  EXPECT_TRUE(Eventually([this] { return Visitors("attached") == 1; }));
  engine_->HoldAfter(-1);
  caller.join();
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_TRUE(sink.attached.ok()) << sink.attached;
  ExpectWholeCache(sink.frames, sink.layout);
  EXPECT_EQ(result->shared_memory_bytes(), result->kv_bytes());
  EXPECT_EQ(Bytes("shared_memory"), static_cast<double>(result->kv_bytes()));
  EXPECT_EQ(Bytes("grpc"), 0);
  EXPECT_TRUE(MemoryIsFree());
  EXPECT_TRUE(EverythingIsFree());
}

INSTANTIATE_TEST_SUITE_P(Calls, Arrival,
                         ::testing::Values(std::pair(1, false), std::pair(4, false),
                                           std::pair(1, true), std::pair(4, true)));

TEST_F(SharedMemoryTest, ACallThatDoesNotAskForItGetsItsPayloadsOverGrpc) {
  StartServer();
  MakeClient();
  KeepingSink sink;
  const auto result = client_->Prefill(PromptOf(kTokens), sink, {.shared_memory = false});
  ASSERT_TRUE(result.ok()) << result.status();
  ExpectWholeCache(sink.frames, sink.layout);
  EXPECT_EQ(result->shared_memory_bytes(), 0);
  EXPECT_EQ(Bytes("grpc"), static_cast<double>(result->kv_bytes()));
}

TEST_F(SharedMemoryTest, WithoutRoomInTheLimitKvComesOverGrpc) {
  options_.shared_memory_bytes = 1 << 20;
  StartServer();
  MakeClient();
  KeepingSink sink;
  const auto result = client_->Prefill(PromptOf(kTokens), sink);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_TRUE(absl::IsResourceExhausted(sink.attached)) << sink.attached;
  ExpectWholeCache(sink.frames, sink.layout);
  EXPECT_EQ(result->shared_memory_bytes(), 0);
  EXPECT_EQ(Visitors("no_memory"), 1);
}

TEST_F(SharedMemoryTest, AServerWithoutItOffersNone) {
  options_.shared_memory_bytes = 0;
  StartServer();
  MakeClient();
  KeepingSink sink;
  const auto result = client_->Prefill(PromptOf(kTokens), sink);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_TRUE(absl::IsNotFound(sink.attached)) << sink.attached;
}

// There the name may be bound by somebody who waits for keys.
TEST_F(SharedMemoryTest, AnAbstractNameOfAnotherNetworkIsNotTried) {
  StartServer();
  v1::Accepted accepted;
  const auto stream = Open(accepted);
  accepted.mutable_shared_memory()->set_network("elsewhere");
  const auto attached = client::SharedMemory::Attach(accepted);
  EXPECT_TRUE(absl::IsUnavailable(attached.status())) << attached.status();
  EXPECT_THAT(attached.status().message(), HasSubstr("network namespace"));
  EXPECT_EQ(Visitors("attached"), 0);
  engine_->HoldAfter(-1);
  EXPECT_TRUE(stream->Rest().status.ok());
}

// The server closes the connection of a consumer that sends a receipt before it says `mapped`.
TEST_F(SharedMemoryTest, NoReceiptGoesOutBeforeTheMemoryIsInUse) {
  StartServer();
  v1::Accepted accepted;
  const auto stream = Open(accepted);
  const auto attached = client::SharedMemory::Attach(accepted);
  ASSERT_TRUE(attached.ok()) << attached.status();
  EXPECT_FALSE((*attached)->Acknowledge(/*lane=*/0, /*received=*/1));
  EXPECT_TRUE((*attached)->Begin().ok());
  EXPECT_TRUE(Eventually([this] { return Visitors("attached") == 1; }));
  EXPECT_EQ(Visitors("broken_off"), 0);
  stream->Cancel();
}

TEST_F(SharedMemoryTest, TheSocketInAFolderServesAndIsRemoved) {
  std::string folder = (std::filesystem::temp_directory_path() / "prefilld-kv-XXXXXX").string();
  ASSERT_NE(mkdtemp(folder.data()), nullptr);
  // Left behind by a server that was killed: bound, and nobody listens.
  const std::string dead = folder + "/prefilld-00000000dead0000.sock";
  { const auto listener = wire::ListenForPackets("unix:" + dead); }
  ASSERT_TRUE(std::filesystem::exists(dead));
  options_.shared_memory_dir = folder;
  StartServer();
  EXPECT_FALSE(std::filesystem::exists(dead));
  v1::Accepted accepted;
  auto stream = Open(accepted);
  ASSERT_EQ(accepted.shared_memory().sockets_size(), 2);
  EXPECT_THAT(accepted.shared_memory().sockets(1), HasSubstr("unix:" + folder));
  Visitor visitor(accepted, 1);
  EXPECT_EQ(visitor.Attach(accepted).code(), 0);
  stream->Cancel();
  StopServer();
  EXPECT_TRUE(std::filesystem::is_empty(folder));
  std::filesystem::remove_all(folder);
}

TEST_F(SharedMemoryTest, OnlyTheKeyOfTheRequestOpensItsMemoryAndOnlyOnce) {
  StartServer();
  v1::Accepted accepted;
  auto stream = Open(accepted);
  std::string wrong = accepted.shared_memory().key();
  wrong.back() = wrong.back() == '0' ? '1' : '0';
  for (const std::string& key : {wrong, std::string(), std::string(1000, '0')}) {
    const auto answer = Visitor(accepted).Attach(accepted, key);
    EXPECT_EQ(answer.code(), static_cast<int>(absl::StatusCode::kPermissionDenied));
  }
  v1::Accepted other = accepted;
  other.set_request_id("another");
  EXPECT_EQ(Visitor(accepted).Attach(other).code(), static_cast<int>(absl::StatusCode::kNotFound));
  EXPECT_EQ(Visitors("refused"), 4);

  Visitor visitor(accepted), late(accepted);
  EXPECT_EQ(visitor.Attach(accepted).code(), 0);
  EXPECT_TRUE(visitor.memory.valid());
  EXPECT_EQ(late.Attach(accepted).code(), static_cast<int>(absl::StatusCode::kAlreadyExists));
  EXPECT_FALSE(late.memory.valid());
}

TEST_F(SharedMemoryTest, WhoMapsNothingGetsPayloads) {
  StartServer();
  v1::Accepted accepted;
  auto stream = Open(accepted);
  {
    Visitor visitor(accepted);
    EXPECT_EQ(visitor.Attach(accepted).code(), 0);
  }  // goes without a word
  EXPECT_TRUE(Eventually([this] { return Visitors("broken_off") == 1; }));
  engine_->HoldAfter(-1);
  const StreamContents contents = stream->Rest();
  ASSERT_TRUE(contents.status.ok()) << contents.status.error_message();
  ExpectWholeCache(contents.frames(), accepted.layout());
  EXPECT_TRUE(MemoryIsFree());
}

TEST_F(SharedMemoryTest, ManyWhoSayNothingAreSentAwayAndTheNextIsServed) {
  StartServer();
  v1::Accepted accepted;
  auto stream = Open(accepted);
  constexpr size_t kMany = 3 * SharedMemoryHost::kMaxUnknown;
  std::vector<Visitor> silent;
  for (size_t i = 0; i < kMany; ++i) silent.emplace_back(accepted);
  for (Visitor& visitor : silent) EXPECT_TRUE(visitor.IsClosed());
  EXPECT_GT(Visitors("too_many"), 0);
  EXPECT_TRUE(Eventually([&] { return Visitors("too_many") + Visitors("broken_off") == kMany; }));
  EXPECT_EQ(Visitor(accepted).Attach(accepted).code(), 0);
}

TEST_F(SharedMemoryTest, AReceiptOfFramesThatWereNotSentEndsThatRequestAlone) {
  StartServer();
  v1::Accepted accepted;
  auto stream = Open(accepted);
  OpenStream other(*stub_, PromptOf(1000));
  Visitor visitor(accepted);
  visitor.Attach(accepted);
  visitor.Map();
  visitor.Acknowledge(0, uint64_t{1} << 63);
  const StreamContents contents = stream->Rest();
  EXPECT_EQ(contents.status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(contents.status.error_message(), HasSubstr("shared memory: lane 0: received"));
  EXPECT_TRUE(visitor.IsClosed());
  engine_->HoldAfter(-1);
  EXPECT_TRUE(other.Rest().status.ok());
  EXPECT_TRUE(MemoryIsFree());
  EXPECT_TRUE(EverythingIsFree());
}

TEST_F(SharedMemoryTest, GarbageAndALaneThatIsNotThereEndTheRequest) {
  StartServer();
  for (const bool garbage : {true, false}) {
    v1::Accepted accepted;
    auto stream = Open(accepted);
    Visitor visitor(accepted);
    visitor.Attach(accepted);
    visitor.Map();
    if (garbage) {
      v1::Accepted no_such_message = accepted;
      no_such_message.set_request_id(std::string(4000, 'x'));
      EXPECT_TRUE(visitor.socket.Send(no_such_message, kPatience).ok());
    } else {
      visitor.Acknowledge(7, 1);
    }
    EXPECT_EQ(stream->Rest().status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
    EXPECT_TRUE(MemoryIsFree());
    engine_->HoldAfter(-1);
    EXPECT_TRUE(EverythingIsFree());
  }
}

// The request's memory is full, and it alone waits, until it is ended like one that takes nothing.
TEST_F(SharedMemoryTest, AConsumerThatAcknowledgesNothingStallsAloneAndIsEnded) {
  engine_options_.num_layers = 16;
  StartServer();
  v1::Accepted accepted;
  auto stream = Open(accepted);
  Visitor visitor(accepted);
  const uint64_t bytes = visitor.Attach(accepted).bytes();
  visitor.Map();
  EXPECT_TRUE(Eventually([this] { return Visitors("attached") == 1; }));
  engine_->HoldAfter(-1);
  uint64_t arrived = 0;
  v1::PrefillEvent event;
  while (arrived < bytes / (1 << 20) && stream->Read(&event)) {
    if (!event.has_kv_frame()) continue;
    EXPECT_GT(event.kv_frame().shared_bytes(), 0);
    ++arrived;
  }
  // On another connection, whose bytes are no progress of this one.
  const auto stub = NewStub();
  EXPECT_TRUE(OpenStream(*stub, PromptOf(1000)).Rest().status.ok()) << "others are held up";
  clock_.Advance(options_.stall_timeout + absl::Seconds(1));
  const StreamContents contents = stream->Rest();
  EXPECT_EQ(contents.frames().size(), 0) << "more frames than the memory holds";
  EXPECT_EQ(contents.status.error_code(), grpc::StatusCode::ABORTED);
  EXPECT_THAT(contents.status.error_message(), HasSubstr("took nothing"));
  EXPECT_TRUE(Eventually([this] { return Ended("stalled") == 1; }));
  EXPECT_TRUE(visitor.IsClosed());
  EXPECT_TRUE(MemoryIsFree());
}

TEST_F(SharedMemoryTest, AConsumerWhoseSocketClosesIsGone) {
  StartServer();
  v1::Accepted accepted;
  auto stream = Open(accepted);
  {
    Visitor visitor(accepted);
    visitor.Attach(accepted);
    visitor.Map();
    EXPECT_TRUE(Eventually([this] { return Visitors("attached") == 1; }));
  }
  EXPECT_EQ(stream->Rest().status.error_code(), grpc::StatusCode::CANCELLED);
  EXPECT_TRUE(MemoryIsFree());
}

}  // namespace
}  // namespace prefilld::server
