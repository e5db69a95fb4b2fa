// A decode worker to which KV is pushed on lanes, and which does as a test tells it.
#ifndef PREFILLD_TESTS_SERVER_LANE_RECEIVER_H_
#define PREFILLD_TESTS_SERVER_LANE_RECEIVER_H_

#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "prefill/v1/receiver.grpc.pb.h"

namespace prefilld::server {

// Keeps what it takes beyond its streams, and does with each frame as told. Thread-safe.
class LaneReceiver final : public ::prefill::v1::KvReceiver::Service {
 public:
  enum class Answer {
    kTake,     // and acknowledge
    kSilence,  // take, and say nothing
    kDamaged,  // say that it is damaged
    kBreak     // end the stream as a broken connection does
  };
  using Script = std::function<Answer(const ::prefill::v1::KvFrame&)>;
  using Opening = std::function<grpc::Status(const ::prefill::v1::ReceiveOpen&, int opened_before)>;
  // Makes something else of a receipt that is true. `opened_before`: streams before this one.
  using Words = std::function<std::vector<::prefill::v1::ReceiveReceipt>(
      const ::prefill::v1::ReceiveReceipt& truth, int opened_before)>;

  explicit LaneReceiver(
      Script script = [](const ::prefill::v1::KvFrame&) { return Answer::kTake; },
      Opening opening = [](const ::prefill::v1::ReceiveOpen&, int) { return grpc::Status::OK; },
      Words words = [](const ::prefill::v1::ReceiveReceipt& truth,
                       int) { return std::vector<::prefill::v1::ReceiveReceipt>{truth}; })
      : script_(std::move(script)), opening_(std::move(opening)), words_(std::move(words)) {
    grpc::ServerBuilder builder;
    builder.SetMaxReceiveMessageSize(-1);
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port_);
    builder.RegisterService(this);
    server_ = builder.BuildAndStart();
  }
  ~LaneReceiver() override { Stop(); }
  void Stop() { server_->Shutdown(std::chrono::system_clock::now()); }

  int port() const { return port_; }
  std::string address() const { return absl::StrCat("127.0.0.1:", port_); }
  std::atomic<int> running = 0, arrivals = 0;
  std::atomic<bool> answers_opening = true;
  std::atomic<int> breaks_at_result = 0;  // so many streams break when they have brought it

  std::vector<::prefill::v1::ReceiveOpen> opens() {
    absl::MutexLock lock(&mu_);
    return opens_;
  }
  std::vector<::prefill::v1::KvFrame> frames() {
    absl::MutexLock lock(&mu_);
    std::vector<::prefill::v1::KvFrame> frames;
    for (const auto& [place, frame] : frames_) frames.push_back(frame);
    return frames;
  }
  std::optional<::prefill::v1::PrefillResult> result() {
    absl::MutexLock lock(&mu_);
    return result_;
  }

 private:
  using Stream =
      grpc::ServerReaderWriter<::prefill::v1::ReceiveReceipt, ::prefill::v1::ReceiveRequest>;

  grpc::Status ReceiveLane(grpc::ServerContext* context, Stream* stream) override {
    const grpc::Status broken(grpc::StatusCode::UNAVAILABLE, "it broke");
    ++running;
    const auto ended = absl::MakeCleanup([this] { --running; });
    ::prefill::v1::ReceiveRequest message;
    if (!stream->Read(&message) || !message.has_open()) return grpc::Status::CANCELLED;
    const ::prefill::v1::ReceiveOpen open = message.open();
    int before = 0;
    {
      absl::MutexLock lock(&mu_);
      before = static_cast<int>(opens_.size());
      opens_.push_back(open);
    }
    if (const grpc::Status opened = opening_(open, before); !opened.ok()) return opened;
    while (!answers_opening && !context->IsCancelled()) absl::SleepFor(absl::Milliseconds(5));
    if (Say(*stream, ReceiptOf(open.lane()), before)) return grpc::Status::OK;
    while (stream->Read(&message)) {
      std::optional<uint64_t> damaged;
      if (message.has_kv_frame()) {
        ++arrivals;
        const Answer answer = script_(message.kv_frame());
        if (answer == Answer::kBreak) return broken;
        if (answer != Answer::kDamaged) Keep(message.kv_frame());
        if (answer == Answer::kSilence) continue;
        if (answer == Answer::kDamaged) damaged = message.kv_frame().sequence();
      } else {
        {
          absl::MutexLock lock(&mu_);
          result_ = message.result();
        }
        if (breaks_at_result-- > 0) return broken;
      }
      ::prefill::v1::ReceiveReceipt receipt = ReceiptOf(open.lane());
      if (damaged.has_value()) receipt.add_damaged(*damaged);
      if (Say(*stream, receipt, before)) return grpc::Status::OK;
    }
    return broken;
  }

  // Returns whether that was the last.
  bool Say(Stream& stream, const ::prefill::v1::ReceiveReceipt& truth, int opened_before) {
    for (const auto& receipt : words_(truth, opened_before)) stream.Write(receipt);
    return truth.complete();
  }
  void Keep(const ::prefill::v1::KvFrame& frame) {
    absl::MutexLock lock(&mu_);
    frames_[{frame.lane(), frame.sequence()}] = frame;
  }
  ::prefill::v1::ReceiveReceipt ReceiptOf(uint32_t lane) {
    absl::MutexLock lock(&mu_);
    ::prefill::v1::ReceiveReceipt receipt;
    while (frames_.count({lane, receipt.received()}) > 0) {
      receipt.set_received(receipt.received() + 1);
    }
    receipt.set_complete(lane == 0 && result_.has_value());
    return receipt;
  }

  const Script script_;
  const Opening opening_;
  const Words words_;
  int port_ = 0;
  absl::Mutex mu_;
  std::vector<::prefill::v1::ReceiveOpen> opens_ ABSL_GUARDED_BY(mu_);
  std::map<std::pair<uint32_t, uint64_t>, ::prefill::v1::KvFrame> frames_ ABSL_GUARDED_BY(mu_);
  std::optional<::prefill::v1::PrefillResult> result_ ABSL_GUARDED_BY(mu_);
  std::unique_ptr<grpc::Server> server_;
};

}  // namespace prefilld::server

#endif  // PREFILLD_TESTS_SERVER_LANE_RECEIVER_H_
