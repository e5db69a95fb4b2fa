// Two consumers for tests of KV in shared memory: one of the client library that keeps what it
// gets, and one that speaks for itself.
#ifndef PREFILLD_TESTS_SERVER_SHARED_MEMORY_FIXTURE_H_
#define PREFILLD_TESTS_SERVER_SHARED_MEMORY_FIXTURE_H_

#include <sys/mman.h>

#include <atomic>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "client/prefill_client.h"
#include "prefill/v1/shared_memory.pb.h"
#include "proto/wire/packet_socket.h"
#include "proto/wire/sealed_memory.h"
#include "tests/server/server_fixture.h"

namespace prefilld::server {

inline constexpr absl::Duration kPatience = absl::Seconds(10);
inline constexpr int kTokens = 4000;

// Keeps what arrives as messages, payloads included.
class KeepingSink final : public client::KvSink {
 public:
  absl::Status OnAccepted(const v1::Accepted& accepted) override {
    layout = accepted.layout();
    return absl::OkStatus();
  }
  absl::Status OnProgress(const v1::Progress&) override { return absl::OkStatus(); }
  void OnSharedMemory(const absl::Status& status) override {
    attached = status;
    is_told = true;
  }
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
  std::atomic<bool> is_told = false;
  absl::Mutex mu;
  std::vector<v1::KvFrame> frames;  // guarded by mu while the call runs
};

// A consumer that speaks for itself, without the client library.
struct Visitor {
  explicit Visitor(const v1::Accepted& accepted, size_t address = 0)
      : socket(*wire::PacketSocket::Connect(
            accepted.shared_memory().sockets(static_cast<int>(address)))) {}

  // Sends `attach` with a descriptor, unless it is negative, and returns the answer.
  v1::SharedMemoryAttached Send(const v1::Accepted& accepted, const std::string& key,
                                uint64_t bytes, int descriptor) {
    v1::SharedMemoryRequest request;
    request.mutable_attach()->set_request_id(accepted.request_id());
    request.mutable_attach()->set_receiver(accepted.receiver());
    request.mutable_attach()->set_key(key);
    request.mutable_attach()->set_bytes(bytes);
    EXPECT_TRUE(socket.Send(request, kPatience, descriptor).ok());
    v1::SharedMemoryAttached answer;
    const absl::Status received = socket.Receive(answer, kPatience);
    EXPECT_TRUE(received.ok()) << received;
    return answer;
  }
  v1::SharedMemoryAttached Attach(const v1::Accepted& accepted, const std::string& key) {
    const uint64_t bytes = accepted.shared_memory().bytes();
    auto made = wire::MakeSealedMemory(bytes);
    EXPECT_TRUE(made.ok()) << made.status();
    memory = *std::move(made);
    mapping = *wire::Mapping::Map(memory, bytes, PROT_READ | PROT_WRITE);
    return Send(accepted, key, bytes, memory.get());
  }
  v1::SharedMemoryAttached Attach(const v1::Accepted& accepted) {
    return Attach(accepted, accepted.shared_memory().key());
  }
  v1::SharedMemoryAttached AttachAgain(const v1::Accepted& accepted) {
    return Send(accepted, accepted.shared_memory().key(), mapping.bytes(), -1);
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
  // Returns the frame with the payload that lies in the memory.
  v1::KvFrame Whole(v1::KvFrame frame) const {
    if (frame.shared_bytes() > 0) {
      frame.set_payload(mapping.data() + frame.shared_offset(), frame.shared_bytes());
    }
    return frame;
  }
  bool IsClosed() {
    v1::SharedMemoryAttached nothing;
    return absl::IsUnavailable(socket.Receive(nothing, kPatience));
  }

  wire::PacketSocket socket;
  wire::Descriptor memory;
  wire::Mapping mapping;
};

// `Base` is ServerFixture or has it for a base.
template <typename Base>
class SharedMemoryServer : public Base {
 protected:
  SharedMemoryServer() { this->engine_options_.num_layers = 6; }

  void MakeClient() {
    auto client = client::PrefillClient::Create({.address = this->address()});
    ASSERT_TRUE(client.ok()) << client.status();
    client_ = *std::move(client);
  }
  double Visitors(const std::string& result) const {
    return this->Metric("prefilld_shared_memory_connections_total{result=\"" + result + "\"}");
  }
  double Bytes(const std::string& transport) const {
    return this->Metric("prefilld_kv_transport_bytes_total{transport=\"" + transport + "\"}");
  }
  double Ended(const std::string& outcome) const {
    return this->Metric("prefilld_requests_total{outcome=\"" + outcome + "\"}");
  }
  bool MemoryIsFree() {
    return Eventually([this] {
      return this->Metric("prefilld_shared_memory_bytes") == 0 &&
             this->Metric("prefilld_shared_memory_attachments") == 0;
    });
  }
  // Has the client make a call of which no layer is computed before it is known whether its memory
  // is in use.
  absl::StatusOr<v1::PrefillResult> PrefillOnceAttached(
      const v1::PrefillRequest& request, KeepingSink& sink,
      const client::PrefillCallOptions& options = {}) {
    const auto in_use = [this] { return Visitors("attached") + Visitors("attached_again"); };
    const double before = in_use();
    this->engine_->HoldAfter(0);
    absl::StatusOr<v1::PrefillResult> result;
    std::thread caller([&] { result = client_->Prefill(request, sink, options); });
    EXPECT_TRUE(Eventually(
        [&] { return sink.is_told && (!sink.attached.ok() || in_use() == before + 1); }));
    this->engine_->HoldAfter(-1);
    caller.join();
    return result;
  }
  // Opens a call that computes no layer before the test says so.
  std::unique_ptr<OpenStream> Open(v1::Accepted& accepted, const v1::PrefillRequest& request) {
    this->engine_->HoldAfter(0);
    auto stream = std::make_unique<OpenStream>(*this->stub_, request);
    accepted = stream->ReadUntil(v1::PrefillEvent::kAccepted).accepted();
    return stream;
  }
  std::unique_ptr<OpenStream> Open(v1::Accepted& accepted) {
    return Open(accepted, PromptOf(kTokens, "shared"));
  }
  // Reads a stream of one lane to its end, receipts included, and returns the frames.
  std::vector<v1::KvFrame> ReadAll(OpenStream& stream, Visitor& visitor) {
    std::vector<v1::KvFrame> frames;
    v1::PrefillEvent event;
    while (stream.Read(&event)) {
      if (!event.has_kv_frame()) continue;
      frames.push_back(visitor.Whole(event.kv_frame()));
      visitor.Acknowledge(0, frames.back().sequence() + 1);
    }
    return frames;
  }

  std::unique_ptr<client::PrefillClient> client_;
};

}  // namespace prefilld::server

#endif  // PREFILLD_TESTS_SERVER_SHARED_MEMORY_FIXTURE_H_
