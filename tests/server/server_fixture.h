// A server over a fake engine on a loopback socket, and what a test needs to talk to it.
#ifndef PREFILLD_TESTS_SERVER_SERVER_FIXTURE_H_
#define PREFILLD_TESTS_SERVER_SERVER_FIXTURE_H_

#include <atomic>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <grpcpp/client_context.h>
#include <grpcpp/support/sync_stream.h>
#include <gtest/gtest.h>

#include "absl/functional/function_ref.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "prefill/v1/prefill.grpc.pb.h"
#include "server/clock.h"
#include "server/server.h"
#include "server/server_options.h"
#include "tests/server/fake_engine.h"

namespace prefilld::server {

namespace v1 = ::prefill::v1;

// A clock of real time plus what a test has added.
class ShiftedClock final : public Clock {
 public:
  absl::Time Now() const override {
    return Clock::Real().Now() + absl::Microseconds(shift_us_.load());
  }
  void Advance(absl::Duration by) { shift_us_ += absl::ToInt64Microseconds(by); }

 private:
  std::atomic<int64_t> shift_us_ = 0;
};

v1::PrefillRequest PromptOf(int num_tokens, const std::string& request_id = "");

// The messages of one stream, and its status.
struct StreamContents {
  std::vector<v1::PrefillEvent> events;
  grpc::Status status;

  std::vector<v1::KvFrame> frames() const;
  const v1::PrefillResult* result() const;  // null: none came
};

// A Prefill, AttachReceiver or AttachLane call that reads when the test says so.
class OpenStream {
 public:
  OpenStream(v1::PrefillService::Stub& stub, const v1::PrefillRequest& request,
             absl::Time deadline = absl::InfiniteFuture());
  OpenStream(v1::PrefillService::Stub& stub, const v1::AttachLaneRequest& request);
  OpenStream(v1::PrefillService::Stub& stub, const v1::AttachReceiverRequest& request,
             absl::Time deadline = absl::InfiniteFuture());
  ~OpenStream() { Cancel(); }

  bool Read(v1::PrefillEvent* event) { return reader_->Read(event); }
  // Reads until an event of that kind and returns it. The test fails if none comes.
  v1::PrefillEvent ReadUntil(v1::PrefillEvent::EventCase kind);
  // Returns when the lane is attached, which its response headers tell.
  void WaitUntilAttached() { reader_->WaitForInitialMetadata(); }
  // Reads to the end.
  StreamContents Rest();
  grpc::Status Finish() { return reader_->Finish(); }
  void Cancel() { context_->TryCancel(); }
  grpc::ClientContext& context() { return *context_; }

 private:
  std::unique_ptr<grpc::ClientContext> context_;
  std::unique_ptr<grpc::ClientReader<v1::PrefillEvent>> reader_;
};

// A call whose stream is read by a thread of its own.
class ReadCall {
 public:
  template <typename Request>
  ReadCall(std::unique_ptr<v1::PrefillService::Stub> stub, const Request& request)
      : stub_(std::move(stub)), stream_(*stub_, request), thread_([this] { Run(); }) {}
  ~ReadCall() {
    if (thread_.joinable()) Contents();
  }

  const StreamContents& Contents() {
    if (thread_.joinable()) thread_.join();
    return contents_;
  }
  void Cancel() { stream_.Cancel(); }
  int frames_so_far() const { return frames_; }

 private:
  void Run() {
    v1::PrefillEvent event;
    while (stream_.Read(&event)) {
      contents_.events.push_back(event);
      if (event.has_kv_frame()) ++frames_;
    }
    contents_.status = stream_.Finish();
  }

  const std::unique_ptr<v1::PrefillService::Stub> stub_;
  OpenStream stream_;
  StreamContents contents_;
  std::atomic<int> frames_ = 0;
  std::thread thread_;
};

// Returns true as soon as `condition` holds, and false after half a minute.
bool Eventually(absl::FunctionRef<bool()> condition);

class ServerFixture : public ::testing::Test {
 protected:
  ServerFixture();
  ~ServerFixture() override;

  // A test may change these before StartServer.
  FakeEngineOptions engine_options_;
  ServerOptions options_;

  void StartServer();
  void StopServer();
  std::unique_ptr<v1::PrefillService::Stub> NewStub(bool own_connection = true) const;
  std::string address() const;

  StreamContents Prefill(const v1::PrefillRequest& request);
  // Returns the value of a series as Prometheus scrapes it, named `name` or `name{label="value"}`;
  // 0 if it is absent.
  double Metric(const std::string& series) const;
  // Makes one grpc.health.v1.Health/Check and returns "serving", "not_serving", or the call's
  // error.
  std::string HealthOf(const std::string& service) const;
  // Waits until the watchdog has made a whole round: it has checked all timers by the clock of now,
  // and the gauges are not older than this call.
  void AwaitWatchdog();
  // Tells whether everything that requests hold has come back.
  bool EverythingIsFree();
  // Lets stall time-outs pass until `ended` holds; returns false if it never does. One may not be
  // enough: what a consumer's machine took before it may be noticed after it, and is progress then.
  // Nothing else should be on its way meanwhile, because time passes for it too.
  bool PassStallTimeoutsUntil(absl::FunctionRef<bool()> ended);
  // Reads from a stream that has much to bring, until the server has noticed that something was
  // taken and has packed more. Returns false when the stream ends before.
  bool TakeUntilNoticed(OpenStream& stream);

  ShiftedClock clock_;
  std::unique_ptr<FakeEngine> engine_;
  std::unique_ptr<PrefillServer> server_;
  std::unique_ptr<v1::PrefillService::Stub> stub_;
};

// Checks numbering, checksums, payloads and completeness of one request's frames over all lanes.
void ExpectWholeCache(const std::vector<v1::KvFrame>& frames, const v1::KvLayout& layout,
                      int64_t cached_tokens = 0);

}  // namespace prefilld::server

#endif  // PREFILLD_TESTS_SERVER_SERVER_FIXTURE_H_
