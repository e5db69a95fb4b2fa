// Tests KV in shared memory over sockets: what arrives, who is refused, and what a consumer can do
// that does not keep the rules.
#include <sys/socket.h>

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <gmock/gmock.h>

#include "client/shared_memory.h"
#include "proto/wire/frame_codec.h"
#include "server/shared_memory_host.h"
#include "tests/server/shared_memory_fixture.h"

namespace prefilld::server {
namespace {

using ::testing::HasSubstr;

class SharedMemoryTest : public SharedMemoryServer<ServerFixture> {};

// The parameters are lanes, and whether the request is resumable.
class Arrival : public SharedMemoryTest,
                public ::testing::WithParamInterface<std::pair<uint32_t, bool>> {};

TEST_P(Arrival, BringsTheWholeCache) {
  StartServer();
  MakeClient();
  v1::PrefillRequest request = PromptOf(kTokens);
  request.set_num_lanes(GetParam().first);
  KeepingSink sink;
  const auto result = PrefillOnceAttached(request, sink, {.resumable = GetParam().second});
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_TRUE(sink.attached.ok()) << sink.attached;
  ExpectWholeCache(sink.frames, sink.layout);
  EXPECT_EQ(result->shared_memory_bytes(), result->kv_bytes());
  EXPECT_EQ(Bytes("shared_memory"), static_cast<double>(result->kv_bytes()));
  EXPECT_EQ(Bytes("grpc"), 0);
  client_.reset();  // keeps the memory for its next call until then
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
  const auto result = PrefillOnceAttached(PromptOf(kTokens), sink);
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

TEST_F(SharedMemoryTest, LittleKvIsNotOfferedAny) {
  StartServer();
  MakeClient();
  for (const int tokens : {1000, kTokens}) {
    KeepingSink sink;
    const auto result = PrefillOnceAttached(PromptOf(tokens), sink);
    ASSERT_TRUE(result.ok()) << result.status();
    const bool is_little = result->kv_bytes() < (8 << 20);
    EXPECT_EQ(is_little, tokens == 1000) << result->kv_bytes();
    EXPECT_EQ(absl::IsNotFound(sink.attached), is_little) << sink.attached;
  }
  EXPECT_EQ(Visitors("attached"), 1);
}

// In another namespace the name may be bound by somebody who waits for keys; a server elsewhere
// could have its consumers call whom it likes.
TEST_F(SharedMemoryTest, NobodyButASocketOfAServerHereIsCalled) {
  StartServer();
  v1::Accepted accepted;
  const auto stream = Open(accepted);
  const std::string network = accepted.shared_memory().network();
  const std::string boot = network.substr(0, network.find('/'));
  const std::string abstract = accepted.shared_memory().sockets(0);
  const auto listener = *wire::ListenForPackets("unix-abstract:somebody-else");
  struct Case {
    std::string network, address, reason;
  };
  for (const Case& c : {Case{boot + "/net:[1]", abstract, "network namespace"},
                        Case{"elsewhere/net:[1]", abstract, "another machine"},
                        Case{"", abstract, "another machine"},
                        Case{network, "unix-abstract:somebody-else", "no server's socket has"},
                        Case{network, "unix:/run/docker.sock", "no server's socket has"}}) {
    v1::Accepted other = accepted;
    other.mutable_shared_memory()->set_network(c.network);
    other.mutable_shared_memory()->set_sockets(0, c.address);
    const auto attached = client::SharedMemory::Attach(other);
    EXPECT_TRUE(absl::IsUnavailable(attached.status())) << attached.status();
    EXPECT_THAT(attached.status().message(), HasSubstr(c.reason));
  }
  EXPECT_EQ(accept(listener.get(), nullptr, nullptr), -1) << "somebody else was called";
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
  EXPECT_EQ(late.Attach(accepted).code(), static_cast<int>(absl::StatusCode::kAlreadyExists));
  EXPECT_TRUE(late.IsClosed());
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

// The server trusts nothing that lies there: it goes on, and the consumer alone has what it wrote.
TEST_F(SharedMemoryTest, AConsumerThatWritesThereFindsAWrongChecksumAndHarmsNobody) {
  StartServer();
  v1::Accepted accepted;
  auto stream = Open(accepted);
  Visitor visitor(accepted);
  ASSERT_EQ(visitor.Attach(accepted).code(), 0);
  visitor.Map();
  EXPECT_TRUE(Eventually([this] { return Visitors("attached") == 1; }));
  engine_->HoldAfter(-1);
  const v1::KvFrame frame = stream->ReadUntil(v1::PrefillEvent::kKvFrame).kv_frame();
  ASSERT_GT(frame.shared_bytes(), 0);
  const auto sum = [&] {
    const std::string payload = visitor.Whole(frame).payload();
    return wire::Checksum(payload.data(), payload.size());
  };
  EXPECT_EQ(sum(), frame.checksum());
  visitor.mapping.data()[frame.shared_offset() + 100] ^= std::byte{1};
  EXPECT_NE(sum(), frame.checksum());
  std::memset(visitor.mapping.data(), 0xff, visitor.mapping.bytes());
  visitor.Acknowledge(0, 1);
  ReadAll(*stream, visitor);
  EXPECT_TRUE(stream->Finish().ok());
  KeepingSink sink;
  MakeClient();
  EXPECT_TRUE(client_->Prefill(PromptOf(kTokens), sink).ok());
  ExpectWholeCache(sink.frames, sink.layout);
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
