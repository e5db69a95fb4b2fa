#include "tests/server/server_fixture.h"

#include <algorithm>
#include <set>
#include <utility>

#include <grpcpp/completion_queue.h>
#include <grpcpp/create_channel.h>
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/security/credentials.h>
#include <prometheus/registry.h>
#include <prometheus/text_serializer.h>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "proto/wire/frame_codec.h"
#include "server/prefill_work.h"

namespace prefilld::server {

v1::PrefillRequest PromptOf(int num_tokens, const std::string& request_id) {
  v1::PrefillRequest request;
  request.set_request_id(request_id);
  for (int i = 0; i < num_tokens; ++i) request.add_token_ids(i % 250);
  return request;
}

std::vector<v1::KvFrame> StreamContents::frames() const {
  std::vector<v1::KvFrame> frames;
  for (const auto& event : events) {
    if (event.has_kv_frame()) frames.push_back(event.kv_frame());
  }
  return frames;
}

const v1::PrefillResult* StreamContents::result() const {
  return !events.empty() && events.back().has_result() ? &events.back().result() : nullptr;
}

OpenStream::OpenStream(v1::PrefillService::Stub& stub, const v1::PrefillRequest& request,
                       absl::Time deadline)
    : context_(std::make_unique<grpc::ClientContext>()) {
  if (deadline != absl::InfiniteFuture()) context_->set_deadline(absl::ToChronoTime(deadline));
  reader_ = stub.Prefill(context_.get(), request);
}

OpenStream::OpenStream(v1::PrefillService::Stub& stub, const v1::AttachLaneRequest& request)
    : context_(std::make_unique<grpc::ClientContext>()) {
  reader_ = stub.AttachLane(context_.get(), request);
}

OpenStream::OpenStream(v1::PrefillService::Stub& stub, const v1::AttachReceiverRequest& request,
                       absl::Time deadline)
    : context_(std::make_unique<grpc::ClientContext>()) {
  if (deadline != absl::InfiniteFuture()) context_->set_deadline(absl::ToChronoTime(deadline));
  reader_ = stub.AttachReceiver(context_.get(), request);
}

v1::PrefillEvent OpenStream::ReadUntil(v1::PrefillEvent::EventCase kind) {
  v1::PrefillEvent event;
  while (Read(&event)) {
    if (event.event_case() == kind) return event;
  }
  ADD_FAILURE() << "no event " << kind << ": " << Finish().error_message();
  return event;
}

StreamContents OpenStream::Rest() {
  StreamContents contents;
  v1::PrefillEvent event;
  while (Read(&event)) contents.events.push_back(event);
  contents.status = Finish();
  return contents;
}

bool Eventually(absl::FunctionRef<bool()> condition) {
  const absl::Time give_up = absl::Now() + absl::Seconds(30);
  while (!condition()) {
    if (absl::Now() > give_up) return false;
    absl::SleepFor(absl::Milliseconds(2));
  }
  return true;
}

ServerFixture::ServerFixture() {
  options_.listen = "127.0.0.1:0";
  options_.metrics_listen = "";
  options_.staging_bytes = 8 << 20;
  options_.pack_threads = 4;  // whatever the machine has
  options_.frame_bytes = 1 << 20;
}

ServerFixture::~ServerFixture() { StopServer(); }

void ServerFixture::StartServer() {
  engine_ = std::make_unique<FakeEngine>(engine_options_);
  engine_->set_clock(&clock_);
  auto server = PrefillServer::Create(options_, *engine_, clock_);
  ASSERT_TRUE(server.ok()) << server.status();
  server_ = *std::move(server);
  stub_ = NewStub(false);
}

void ServerFixture::StopServer() {
  if (engine_ != nullptr) {
    engine_->HoldAfter(-1);
    engine_->HoldLogprobsAfter(-1);
  }
  server_.reset();
}

std::string ServerFixture::address() const { return absl::StrCat("127.0.0.1:", server_->port()); }

std::unique_ptr<v1::PrefillService::Stub> ServerFixture::NewStub(bool own_connection) const {
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(-1);
  if (own_connection) arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  return v1::PrefillService::NewStub(
      grpc::CreateCustomChannel(address(), grpc::InsecureChannelCredentials(), arguments));
}

StreamContents ServerFixture::Prefill(const v1::PrefillRequest& request) {
  return OpenStream(*stub_, request).Rest();
}

double ServerFixture::Metric(const std::string& series) const {
  const std::string page =
      prometheus::TextSerializer().Serialize(server_->metrics().registry()->Collect());
  for (absl::string_view line : absl::StrSplit(page, '\n')) {
    double value = 0;
    if (absl::ConsumePrefix(&line, absl::StrCat(series, " ")) && absl::SimpleAtod(line, &value)) {
      return value;
    }
  }
  return 0;
}

std::string ServerFixture::HealthOf(const std::string& service) const {
  grpc::GenericStub stub(grpc::CreateChannel(address(), grpc::InsecureChannelCredentials()));
  grpc::ClientContext context;
  grpc::CompletionQueue queue;
  // The bytes are HealthCheckRequest{service = 1}; the answer is HealthCheckResponse{status = 1},
  // which is 1 for serving and 2 for not serving.
  const grpc::Slice slice(absl::StrCat("\n", std::string(1, service.size()), service));
  auto call = stub.PrepareUnaryCall(&context, "/grpc.health.v1.Health/Check",
                                    grpc::ByteBuffer(&slice, 1), &queue);
  call->StartCall();
  grpc::ByteBuffer response;
  grpc::Status status;
  void* tag = nullptr;
  bool ok = false;
  call->Finish(&response, &status, &queue);
  queue.Next(&tag, &ok);
  if (!status.ok()) return absl::StrCat("error ", status.error_code());
  grpc::Slice bytes;
  EXPECT_TRUE(response.DumpToSingleSlice(&bytes).ok());
  return bytes.size() == 2 && bytes.begin()[1] == 1 ? "serving" : "not_serving";
}

// The engine is asked near the end of a round. Two times later the round under way is over, and
// three times later the one after it has set its gauges.
void ServerFixture::AwaitWatchdog() {
  const int asked = engine_->asked_for_gauges();
  EXPECT_TRUE(Eventually([&] { return engine_->asked_for_gauges() >= asked + 3; }));
}

bool ServerFixture::EverythingIsFree() {
  AwaitWatchdog();
  return Eventually([this] {
    return engine_->alive() == 0 && Metric("prefilld_live_requests") == 0 &&
           Metric("prefilld_queued_requests") == 0 && Metric("prefilld_queued_tokens") == 0 &&
           Metric("prefilld_running_requests") == 0 && Metric("prefilld_staged_bytes") == 0;
  });
}

bool ServerFixture::PassStallTimeoutsUntil(absl::FunctionRef<bool()> ended) {
  return Eventually([&] {
    clock_.Advance(options_.stall_timeout + absl::Seconds(1));
    const absl::Time next = absl::Now() + absl::Seconds(3);
    while (!ended() && absl::Now() < next) absl::SleepFor(absl::Milliseconds(2));
    return ended();
  });
}

bool ServerFixture::TakeUntilNoticed(OpenStream& stream) {
  const auto packed = [this] { return Metric("prefilld_kv_bytes_total{lane=\"0\"}"); };
  const double before = packed();
  v1::PrefillEvent event;
  while (stream.Read(&event)) {
    // The sockets may hold several frames before the server notices that one was taken.
    const absl::Time next = absl::Now() + absl::Milliseconds(100);
    while (absl::Now() < next) {
      if (packed() > before) return true;
      absl::SleepFor(absl::Milliseconds(2));
    }
  }
  return false;
}

void ExpectWholeCache(const std::vector<v1::KvFrame>& frames, const v1::KvLayout& layout,
                      int64_t cached_tokens) {
  std::map<uint32_t, std::set<uint64_t>> sequences;  // by lane
  std::set<std::pair<uint32_t, uint32_t>> blocks_of_layer;
  for (const v1::KvFrame& frame : frames) {
    EXPECT_TRUE(sequences[frame.lane()].insert(frame.sequence()).second);
    EXPECT_EQ(frame.checksum(), wire::Checksum(frame.payload().data(), frame.payload().size()));
    if (int64_t{frame.first_block()} * layout.block_tokens() >= cached_tokens) {
      EXPECT_GE(frame.layers_computed(), frame.layer() + 1);
    }
    EXPECT_LE(frame.layers_computed(), layout.num_layers());
    EXPECT_EQ(frame.payload(),
              ExpectedPayload(static_cast<int>(frame.layer()),
                              SelectBlocks(layout, frame.first_block(), frame.num_blocks()),
                              layout.num_tokens(), static_cast<int>(layout.head_dim())))
        << "layer " << frame.layer() << " block " << frame.first_block();
    for (uint32_t i = 0; i < frame.num_blocks(); ++i) {
      EXPECT_TRUE(blocks_of_layer.insert({frame.layer(), frame.first_block() + i}).second);
    }
  }
  EXPECT_EQ(blocks_of_layer.size(),
            layout.num_layers() * (layout.num_blocks() - layout.first_block()));
  if (!blocks_of_layer.empty()) {
    EXPECT_EQ(blocks_of_layer.begin()->second, layout.first_block());
    EXPECT_EQ(blocks_of_layer.rbegin()->second, layout.num_blocks() - 1);
  }
  for (const auto& [lane, numbers] : sequences) {
    EXPECT_EQ(*numbers.rbegin() + 1, numbers.size()) << "a gap on lane " << lane;
  }
}

}  // namespace prefilld::server
