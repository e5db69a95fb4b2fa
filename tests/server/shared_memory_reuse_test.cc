// Tests one memory for many requests: who keeps it and for how long, and what becomes of a request
// whose consumer goes on to the next, goes early, or comes back elsewhere.
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <gmock/gmock.h>

#include "absl/strings/str_cat.h"
#include "client/shared_memory.h"
#include "client/shared_memory_pool.h"
#include "tests/server/resumption_fixture.h"
#include "tests/server/shared_memory_fixture.h"

namespace prefilld::server {
namespace {

using ::testing::HasSubstr;

class SharedMemoryReuse : public SharedMemoryServer<ServerFixture> {};
class SharedMemoryResumption : public SharedMemoryServer<Resumption> {};

TEST_F(SharedMemoryReuse, OneMemoryServesManyCallsOneAfterTheOther) {
  StartServer();
  MakeClient();
  constexpr int kCalls = 12;
  for (int call = 0; call < kCalls; ++call) {
    v1::PrefillRequest request = PromptOf(kTokens + 100 * call);
    request.set_num_lanes(2);
    KeepingSink sink;
    const auto result = PrefillOnceAttached(request, sink, {.resumable = call % 2 == 1});
    ASSERT_TRUE(result.ok()) << result.status();
    EXPECT_TRUE(sink.attached.ok()) << sink.attached;
    EXPECT_GT(result->shared_memory_bytes(), 0);
    ExpectWholeCache(sink.frames, sink.layout);
  }
  EXPECT_EQ(Visitors("attached"), 1);
  EXPECT_EQ(Visitors("attached_again"), kCalls - 1);
  EXPECT_TRUE(Eventually([this] { return Metric("prefilld_shared_memory_attachments") == 1; }));
  client_.reset();
  EXPECT_TRUE(MemoryIsFree());
}

TEST_F(SharedMemoryReuse, CallsAtOnceHaveAMemoryEachAndFewAreKept) {
  StartServer();
  MakeClient();
  engine_->HoldAfter(0);
  constexpr int kCalls = 6;
  std::vector<std::thread> callers;
  for (int call = 0; call < kCalls; ++call) {
    callers.emplace_back([this] {
      KeepingSink sink;
      const auto result = client_->Prefill(PromptOf(kTokens), sink);
      EXPECT_TRUE(result.ok()) << result.status();
      ExpectWholeCache(sink.frames, sink.layout);
    });
  }
  EXPECT_TRUE(Eventually([this] { return Visitors("attached") == kCalls; }));
  engine_->HoldAfter(-1);
  for (std::thread& caller : callers) caller.join();
  EXPECT_TRUE(Eventually([this] {
    return Metric("prefilld_shared_memory_attachments") == client::SharedMemoryPool::kMostKept;
  }));
}

TEST_F(SharedMemoryReuse, AMemoryThatIsTooSmallForTheNextCallIsReplaced) {
  StartServer();
  MakeClient();
  for (const uint32_t lanes : {1, 4, 1}) {
    v1::PrefillRequest request = PromptOf(2 * kTokens);
    request.set_num_lanes(lanes);
    KeepingSink sink;
    ASSERT_TRUE(PrefillOnceAttached(request, sink).ok());
    ExpectWholeCache(sink.frames, sink.layout);
  }
  EXPECT_EQ(Visitors("attached"), 2);
  EXPECT_EQ(Visitors("attached_again"), 1) << "the larger one serves the smaller call";
  EXPECT_TRUE(Eventually([this] { return Metric("prefilld_shared_memory_attachments") == 1; }));
}

TEST_F(SharedMemoryReuse, ACallWithoutAnOfferLeavesTheMemoryToTheNext) {
  StartServer();
  MakeClient();
  for (const int num_tokens : {kTokens, 10, kTokens}) {
    v1::PrefillRequest request = PromptOf(num_tokens);
    request.set_num_lanes(1);
    KeepingSink sink;
    ASSERT_TRUE(PrefillOnceAttached(request, sink).ok());
    EXPECT_EQ(sink.attached.ok(), num_tokens == kTokens) << sink.attached;
    ExpectWholeCache(sink.frames, sink.layout);
  }
  EXPECT_EQ(Visitors("attached"), 1);
  EXPECT_EQ(Visitors("attached_again"), 1);
}

// Each has a thread, so those that nobody uses go soon when there are many.
TEST_F(SharedMemoryReuse, AMemoryIsNotKeptForLongWhereManyAre) {
  options_.max_shared_memories = 4;
  StartServer();
  std::vector<std::unique_ptr<Visitor>> visitors;
  for (int64_t i = 0; i <= options_.max_shared_memories / 2; ++i) {
    v1::Accepted accepted;
    const auto stream = Open(accepted, PromptOf(kTokens, absl::StrCat("shared-", i)));
    accepted.mutable_shared_memory()->set_bytes(4 << 20);
    visitors.push_back(std::make_unique<Visitor>(accepted));
    ASSERT_EQ(visitors.back()->Attach(accepted).code(), 0);
    visitors.back()->Map();
    EXPECT_TRUE(Eventually([&] { return Visitors("attached") == i + 1; }));
    engine_->HoldAfter(-1);
    ReadAll(*stream, *visitors.back());
    EXPECT_TRUE(stream->Finish().ok());
  }
  EXPECT_TRUE(visitors.back()->IsClosed());
}

TEST_F(SharedMemoryReuse, AMemoryThatNobodyUsesIsDropped) {
  StartServer();
  v1::Accepted accepted;
  client::SharedMemoryPool pool(absl::Milliseconds(50));
  const auto first = Open(accepted);
  auto memory = pool.Attach(accepted);
  ASSERT_TRUE(memory.ok()) << memory.status();
  EXPECT_TRUE((*memory)->Begin().ok());
  EXPECT_TRUE(Eventually([this] { return Visitors("attached") == 1; }));
  engine_->HoldAfter(-1);
  v1::PrefillEvent event;
  while (first->Read(&event)) {
    if (event.has_kv_frame()) (*memory)->Acknowledge(0, event.kv_frame().sequence() + 1);
  }
  EXPECT_TRUE(first->Finish().ok());
  EXPECT_TRUE(Eventually([this] { return Metric("prefilld_shared_memory_attachments") == 1; }));
  pool.Keep(*std::move(memory));
  EXPECT_TRUE(MemoryIsFree());
}

// More calls at once than the process may make memory for get their KV over gRPC.
TEST_F(SharedMemoryReuse, AProcessMakesNoMoreThanItMay) {
  StartServer();
  constexpr size_t kLarge = client::SharedMemory::kMostBytes / 8;
  std::vector<std::unique_ptr<OpenStream>> streams;
  const auto attach = [&] {
    v1::Accepted accepted;
    const std::string id = absl::StrCat("shared-", streams.size());
    streams.push_back(Open(accepted, PromptOf(kTokens, id)));
    accepted.mutable_shared_memory()->set_bytes(kLarge);
    return client::SharedMemory::Attach(accepted);
  };
  std::vector<std::unique_ptr<client::SharedMemory>> memories;
  for (int memory = 0; memory < 8; ++memory) {
    auto attached = attach();
    ASSERT_TRUE(attached.ok()) << attached.status();
    memories.push_back(*std::move(attached));
  }
  const auto one_more = attach();
  EXPECT_TRUE(absl::IsResourceExhausted(one_more.status())) << one_more.status();
  EXPECT_THAT(one_more.status().message(), HasSubstr("that this process makes for servers"));
  memories.pop_back();
  EXPECT_TRUE(attach().ok());
}

TEST_F(SharedMemoryReuse, AServerThatIsNewAtTheAddressGetsANewMemory) {
  StartServer();
  v1::Accepted accepted;
  client::SharedMemoryPool pool;
  {
    const auto stream = Open(accepted);
    auto memory = pool.Attach(accepted);
    ASSERT_TRUE(memory.ok()) << memory.status();
    pool.Keep(*std::move(memory));
  }
  StopServer();
  StartServer();
  const auto stream = Open(accepted);
  EXPECT_TRUE(pool.Attach(accepted).ok());
}

TEST_F(SharedMemoryReuse, ASecondDescriptorIsRefusedAndSoIsARequestThatDoesNotRun) {
  StartServer();
  for (const bool with_descriptor : {true, false}) {
    v1::Accepted accepted;
    const auto stream = Open(accepted);
    Visitor visitor(accepted);
    ASSERT_EQ(visitor.Attach(accepted).code(), 0);
    visitor.Map();
    engine_->HoldAfter(-1);
    ReadAll(*stream, visitor);
    EXPECT_TRUE(stream->Finish().ok());
    v1::Accepted next;
    const auto next_stream = Open(next, PromptOf(kTokens, "next"));
    if (with_descriptor) {
      EXPECT_THAT(visitor.Attach(next).message(), HasSubstr("this connection has its memory"));
    } else {
      next.set_request_id("another");
      EXPECT_EQ(visitor.AttachAgain(next).code(), static_cast<int>(absl::StatusCode::kNotFound));
    }
    EXPECT_TRUE(visitor.IsClosed());
    next_stream->Cancel();
    EXPECT_TRUE(MemoryIsFree());
    engine_->HoldAfter(-1);
    EXPECT_TRUE(EverythingIsFree());
  }
}

// These receipts are for frames from before the memory was in use. The server needs none of them.
TEST_F(SharedMemoryReuse, ReceiptsOfARequestThatIsOverLeaveTheMemoryAttached) {
  StartServer();
  v1::Accepted accepted, next_accepted;
  const auto stream = Open(accepted);
  Visitor visitor(accepted);
  ASSERT_EQ(visitor.Attach(accepted).code(), 0);
  visitor.Map();
  EXPECT_TRUE(Eventually([this] { return Visitors("attached") == 1; }));
  engine_->HoldAfter(-1);
  const size_t frames = ReadAll(*stream, visitor).size();
  EXPECT_TRUE(stream->Finish().ok());
  EXPECT_TRUE(Eventually([this] { return Ended("ok") == 1; }));
  // The first of them may still be taken for the request's, and the others are not then.
  for (int receipt = 0; receipt < 3; ++receipt) visitor.Acknowledge(0, frames);
  visitor.Map();
  const auto next = Open(next_accepted, PromptOf(kTokens, "next"));
  EXPECT_EQ(visitor.AttachAgain(next_accepted).code(), 0);
  visitor.Map();
  EXPECT_TRUE(Eventually([this] { return Visitors("attached_again") == 1; }));
  engine_->HoldAfter(-1);
  ExpectWholeCache(ReadAll(*next, visitor), next_accepted.layout());
  EXPECT_TRUE(next->Finish().ok());
}

TEST_F(SharedMemoryReuse, WhoGoesOnToTheNextRequestTooEarlyHasCancelledTheFirst) {
  StartServer();
  v1::Accepted first, second;
  const auto stream = Open(first);
  Visitor visitor(first);
  ASSERT_EQ(visitor.Attach(first).code(), 0);
  visitor.Map();
  const auto next = Open(second, PromptOf(kTokens, "second"));
  EXPECT_EQ(visitor.AttachAgain(second).code(), 0);
  visitor.Map();
  EXPECT_EQ(stream->Rest().status.error_code(), grpc::StatusCode::CANCELLED);
  EXPECT_TRUE(Eventually([this] { return Visitors("attached_again") == 1; }));
  engine_->HoldAfter(-1);
  ExpectWholeCache(ReadAll(*next, visitor), second.layout());
  EXPECT_TRUE(next->Finish().ok());
}

// The consumer has all KV before the server has said how it ended, and does not wait for that.
TEST_F(SharedMemoryReuse, WhoHasEverythingAndGoesHasCancelledNothing) {
  StartServer();
  for (const bool goes_on : {false, true}) {
    v1::Accepted accepted, next_accepted;
    v1::PrefillRequest request = PromptOf(kTokens, "first");
    request.set_prompt_logprobs(true);
    auto stream = Open(accepted, request);
    engine_->HoldLogprobsAfter(0);
    std::unique_ptr<OpenStream> next;
    auto visitor = std::make_unique<Visitor>(accepted);
    ASSERT_EQ(visitor->Attach(accepted).code(), 0);
    visitor->Map();
    EXPECT_TRUE(Eventually([&] { return Visitors("attached") == (goes_on ? 2 : 1); }));
    engine_->HoldAfter(-1);
    int64_t blocks = 0;
    std::vector<v1::KvFrame> frames;
    v1::PrefillEvent event;
    while (blocks < int64_t{accepted.layout().num_blocks()} * accepted.layout().num_layers() &&
           stream->Read(&event)) {
      if (!event.has_kv_frame()) continue;
      frames.push_back(visitor->Whole(event.kv_frame()));
      blocks += event.kv_frame().num_blocks();
      visitor->Acknowledge(0, event.kv_frame().sequence() + 1);
    }
    if (goes_on) {
      next = Open(next_accepted, PromptOf(kTokens, "next"));
      EXPECT_EQ(visitor->AttachAgain(next_accepted).code(), 0);
    } else {
      visitor.reset();
      EXPECT_TRUE(MemoryIsFree());
    }
    engine_->HoldLogprobsAfter(-1);
    const StreamContents contents = stream->Rest();
    EXPECT_TRUE(contents.status.ok()) << contents.status.error_message();
    EXPECT_NE(contents.result(), nullptr);
    ExpectWholeCache(frames, accepted.layout());
  }
  EXPECT_TRUE(Eventually([this] { return Ended("ok") == 2; }));
}

// The process that has attached the memory still runs, or hangs, and another one takes the request
// over. It has no such memory.
TEST_F(SharedMemoryResumption, ElsewhereBringsPayloadsWhileTheOldSocketIsOpen) {
  engine_options_.num_layers = 16;
  StartServer();
  v1::Accepted accepted;
  auto stream = Open(accepted, Resumable(kTokens));
  Visitor visitor(accepted);
  ASSERT_EQ(visitor.Attach(accepted).code(), 0);
  visitor.Map();
  EXPECT_TRUE(Eventually([this] { return Visitors("attached") == 1; }));
  engine_->HoldAfter(-1);
  EXPECT_GT(stream->ReadUntil(v1::PrefillEvent::kKvFrame).kv_frame().shared_bytes(), 0);

  const auto stub = NewResumptionStub();
  Resumed resumed(*stub, From(0));
  std::vector<v1::KvFrame> frames;
  v1::PrefillEvent event;
  bool has_result = false;
  while (!has_result && resumed.reader->Read(&event)) {
    has_result = event.has_result();
    if (!event.has_kv_frame()) continue;
    EXPECT_EQ(event.kv_frame().shared_bytes(), 0) << "it lies where only the other one reads";
    frames.push_back(event.kv_frame());
    EXPECT_TRUE(Acknowledge(0, event.kv_frame().sequence() + 1).ok());
  }
  EXPECT_TRUE(has_result);
  ExpectWholeCache(frames, accepted.layout());
  EXPECT_TRUE(Acknowledge(0, frames.size(), {}, /*complete=*/true).ok());
  EXPECT_TRUE(Eventually([this] { return Ended("ok") == 1; }));
}

TEST_F(SharedMemoryResumption, ThatIsRefusedChangesNothingForTheStreamThatIsThere) {
  engine_options_.num_layers = 16;
  StartServer();
  v1::Accepted accepted;
  auto stream = Open(accepted, Resumable(kTokens));
  Visitor visitor(accepted);
  ASSERT_EQ(visitor.Attach(accepted).code(), 0);
  visitor.Map();
  EXPECT_TRUE(Eventually([this] { return Visitors("attached") == 1; }));
  std::vector<std::thread> callers;  // at once, so that none takes another's change for the state
  for (int caller = 0; caller < 8; ++caller) {
    callers.emplace_back([this] {
      const auto stub = NewResumptionStub();
      for (int call = 0; call < 400; ++call) {
        Resumed refused(*stub, From(1'000'000));
        EXPECT_EQ(refused.Rest().status.error_code(), grpc::StatusCode::OUT_OF_RANGE);
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  engine_->HoldAfter(-1);
  std::vector<v1::KvFrame> frames;
  v1::PrefillEvent event;
  while (stream->Read(&event)) {
    if (!event.has_kv_frame()) continue;
    EXPECT_GT(event.kv_frame().shared_bytes(), 0);
    frames.push_back(visitor.Whole(event.kv_frame()));
    visitor.Acknowledge(0, event.kv_frame().sequence() + 1);
  }
  EXPECT_TRUE(stream->Finish().ok());
  ExpectWholeCache(frames, accepted.layout());
}

TEST_F(SharedMemoryResumption, OfTheSameConsumerGoesOnInItsMemoryWhenItSaysSo) {
  engine_options_.num_layers = 16;
  StartServer();
  v1::Accepted accepted;
  auto stream = Open(accepted, Resumable(kTokens));
  Visitor visitor(accepted);
  ASSERT_EQ(visitor.Attach(accepted).code(), 0);
  visitor.Map();
  EXPECT_TRUE(Eventually([this] { return Visitors("attached") == 1; }));
  engine_->HoldAfter(-1);
  stream->ReadUntil(v1::PrefillEvent::kKvFrame);
  stream->Cancel();
  const auto stub = NewResumptionStub();
  Resumed resumed(*stub, From(0));
  std::vector<v1::KvFrame> frames;
  v1::PrefillEvent event;
  int64_t shared = 0;
  bool has_result = false;
  while (!has_result && resumed.reader->Read(&event)) {
    if (event.has_accepted()) visitor.Map();
    has_result = event.has_result();
    if (!event.has_kv_frame()) continue;
    shared += event.kv_frame().shared_bytes();
    frames.push_back(visitor.Whole(event.kv_frame()));
    visitor.Acknowledge(0, event.kv_frame().sequence() + 1);
  }
  EXPECT_TRUE(has_result);
  EXPECT_GT(shared, 0);
  ExpectWholeCache(frames, accepted.layout());
  EXPECT_TRUE(Acknowledge(0, frames.size(), {}, /*complete=*/true).ok());
}

}  // namespace
}  // namespace prefilld::server
