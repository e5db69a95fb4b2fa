#include "proto/wire/arrivals.h"

#include <algorithm>
#include <functional>
#include <string>
#include <utility>

#include <grpc/support/alloc.h>
#include <grpcpp/server_context.h>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"

namespace prefilld::wire {
namespace {

using grpc::internal::MethodHandler;

// A machine that is busy may need a while for a request that was sent at once.
constexpr absl::Duration kLeastLimit = absl::Seconds(5);

// Returns the peer's address as grpc::ServerContext::peer() does.
std::string PeerOf(grpc_call* call) {
  const std::unique_ptr<char, decltype(&gpr_free)> peer(grpc_call_get_peer(call), gpr_free);
  return peer.get();
}

// One call from its headers to its request. gRPC runs it as the tag of the read, once.
class Arrival : public grpc_completion_queue_functor {
 public:
  Arrival(Arrivals& arrivals, MethodHandler& handler, const MethodHandler::HandlerParameter& call)
      : arrivals_(arrivals), handler_(handler), call_(call) {
    functor_run = [](grpc_completion_queue_functor* self, int) {
      const std::unique_ptr<Arrival> arrival(static_cast<Arrival*>(self));
      arrival->GoOn();
    };
    inlineable = 0;
    number_ = arrivals_.Begin(grpc_call());
    stream_ = std::make_shared<Arrivals::Stream>(arrivals_, PeerOf(grpc_call()));
  }

  void Start() {
    arrivals_.Read(number_, [this] { Read(); });
  }

 private:
  ::grpc_call* grpc_call() const { return call_.call->call(); }

  void Read() {
    grpc_op read = {};
    read.op = GRPC_OP_RECV_MESSAGE;
    read.data.recv_message.recv_message = &request_;
    if (grpc_call_start_batch(grpc_call(), &read, 1, this, nullptr) != GRPC_CALL_OK) {
      functor_run(this, 0);
    }
  }

  // A call that was broken off is run too, because the handler is who takes it apart. No service
  // hears of it then.
  void GoOn() {
    const bool broken_off =
        request_ == nullptr && grpc_call_failed_before_recv_message(grpc_call()) != 0;
    arrivals_.End(number_, broken_off);
    grpc::Status status;
    void* data = nullptr;
    void* request = handler_.Deserialize(grpc_call(), request_, &status, &data);
    if (broken_off) status = grpc::Status::CANCELLED;
    // gRPC calls this once the call is over, and the server may go as soon as it has heard of it.
    auto on_over = [stream = std::move(stream_), on_over = call_.call_requester]() mutable {
      stream.reset();
      on_over();
    };
    handler_.RunHandler(
        {call_.call, call_.server_context, request, std::move(status), data, on_over});
  }

  Arrivals& arrivals_;
  MethodHandler& handler_;
  const MethodHandler::HandlerParameter call_;
  int64_t number_ = 0;
  std::shared_ptr<Arrivals::Stream> stream_;  // the call's, until it is over
  grpc_byte_buffer* request_ = nullptr;       // the handler's from Deserialize on
};

class WatchedHandler final : public MethodHandler {
 public:
  WatchedHandler(Arrivals& arrivals, std::unique_ptr<MethodHandler> handler)
      : arrivals_(arrivals), handler_(std::move(handler)) {}

  void RunHandler(const HandlerParameter& call) override {
    (new Arrival(arrivals_, *handler_, call))->Start();
  }

 private:
  Arrivals& arrivals_;
  const std::unique_ptr<MethodHandler> handler_;
};

// It is a part of the call's context, which keeps the call.
class ReflectionCall final : public grpc::experimental::Interceptor {
 public:
  ReflectionCall(Arrivals& arrivals, grpc::ServerContextBase* context)
      : arrivals_(arrivals), context_(context) {}
  ~ReflectionCall() override { arrivals_.End(number_); }

  // The context has no call yet when this is made.
  void Intercept(grpc::experimental::InterceptorBatchMethods* methods) override {
    using grpc::experimental::InterceptionHookPoints;
    if (methods->QueryInterceptionHookPoint(InterceptionHookPoints::POST_RECV_INITIAL_METADATA)) {
      number_ = arrivals_.Begin(context_->c_call());
    }
    methods->Proceed();
  }

 private:
  Arrivals& arrivals_;
  grpc::ServerContextBase* const context_;
  int64_t number_ = 0;
};

class ReflectionCalls final : public grpc::experimental::ServerInterceptorFactoryInterface {
 public:
  explicit ReflectionCalls(Arrivals& arrivals) : arrivals_(arrivals) {}
  grpc::experimental::Interceptor* CreateServerInterceptor(
      grpc::experimental::ServerRpcInfo* info) override {
    if (!absl::StartsWith(info->method(), "/grpc.reflection.")) return nullptr;
    return new ReflectionCall(arrivals_, info->server_context());
  }

 private:
  Arrivals& arrivals_;
};

}  // namespace

absl::Duration Arrivals::LimitFor(absl::Duration stall_timeout) {
  return std::max(stall_timeout, kLeastLimit);
}

std::unique_ptr<MethodHandler> Arrivals::Watch(std::unique_ptr<MethodHandler> handler) {
  return std::make_unique<WatchedHandler>(*this, std::move(handler));
}

std::unique_ptr<grpc::experimental::ServerInterceptorFactoryInterface> Arrivals::WatchReflection() {
  return std::make_unique<ReflectionCalls>(*this);
}

int64_t Arrivals::Begin(grpc_call* call) {
  std::string peer = PeerOf(call);
  NoteCall(peer);
  const absl::Time until = absl::Now() + limit_;
  absl::MutexLock lock(&mu_);
  Entry& entry = open_[++last_];
  entry.call = call;
  entry.peer = std::move(peer);
  entry.until = until;
  return last_;
}

void Arrivals::End(int64_t number, bool broken_off) {
  Reads reads;
  {
    absl::MutexLock lock(&mu_);
    const auto entry = open_.find(number);
    if (entry == open_.end()) return;
    if (broken_off && !entry->second.ended) ++broken_off_;
    Leave(number, entry->second);
    open_.erase(entry);
    reads = TakeTurns(absl::Now());
  }
  for (const auto& read : reads) read();
}

void Arrivals::Read(int64_t number, std::function<void()> read) {
  Reads reads;
  {
    absl::MutexLock lock(&mu_);
    Entry& entry = open_.at(number);
    if (entry.ended) {
      reads.push_back(std::move(read));
    } else {
      entry.read = std::move(read);
      peers_[entry.peer].waiting.insert(number);
      ++waiting_;
      const absl::Time now = absl::Now();
      reads = TakeTurns(now);
      if (waiting_ > 0) MakeRoom(now);
    }
  }
  for (const auto& start : reads) start();
}

Arrivals::Reads Arrivals::TakeTurns(absl::Time now) {
  Reads reads;
  while (waiting_ > 0 && read_at_once_ < max_read_at_once_) {
    Peer* next = nullptr;
    for (auto& [name, peer] : peers_) {
      if (peer.waiting.empty()) continue;
      const auto rank = [](const Peer& of) {
        return std::pair(of.read.size(), *of.waiting.begin());
      };
      if (next == nullptr || rank(peer) < rank(*next)) next = &peer;
    }
    const int64_t number = *next->waiting.begin();
    next->waiting.erase(number);
    next->read.insert(number);
    --waiting_;
    ++read_at_once_;
    Entry& entry = open_.at(number);
    entry.read_since = now;
    entry.until = now + limit_;
    reads.push_back(std::exchange(entry.read, nullptr));
  }
  return reads;
}

// Takes a call off the lists of its connection.
void Arrivals::Leave(int64_t number, const Entry& entry) {
  const auto found = peers_.find(entry.peer);
  if (found == peers_.end()) return;
  Peer& peer = found->second;
  if (peer.waiting.erase(number) > 0) --waiting_;
  if (peer.read.erase(number) > 0) {
    --read_at_once_;
    if (entry.ended) --leaving_;
  }
  if (peer.waiting.empty() && peer.read.empty()) peers_.erase(found);
}

// Ends no more calls than wait.
void Arrivals::MakeRoom(absl::Time now) {
  while (leaving_ < waiting_) {
    const int64_t number = MostInTheWay(now);
    if (number == 0) return;
    EndCall(
        open_.at(number), GRPC_STATUS_RESOURCE_EXHAUSTED,
        absl::StrCat("others wait, and ", max_read_at_once_, " requests arrive at once: this one ",
                     "did not within ", absl::FormatDuration(kPatience)));
  }
}

int64_t Arrivals::MostInTheWay(absl::Time now) const {
  int64_t most = 0;
  size_t of_peer = 0;
  for (const auto& [name, peer] : peers_) {
    for (const int64_t number : peer.read) {
      const Entry& entry = open_.at(number);
      if (entry.ended || now - entry.read_since < kPatience) continue;
      if (peer.read.size() > of_peer) {
        of_peer = peer.read.size();
        most = number;
      }
      break;
    }
  }
  return most;
}

void Arrivals::EndCall(Entry& entry, grpc_status_code code, const std::string& reason) {
  entry.ended = true;
  ++late_;
  if (entry.read_since != absl::InfiniteFuture()) ++leaving_;
  grpc_call_cancel_with_status(entry.call, code, reason.c_str(), nullptr);
}

// The lock keeps the calls alive meanwhile. Cancelling does not call back.
void Arrivals::EndLate(absl::Time now) {
  const std::string too_late =
      absl::StrCat("the request did not arrive within ", absl::FormatDuration(limit_));
  Reads reads;
  {
    absl::MutexLock lock(&mu_);
    for (auto& [number, entry] : open_) {
      if (now < entry.until || entry.ended) continue;
      EndCall(entry, GRPC_STATUS_DEADLINE_EXCEEDED, too_late);
      if (entry.read == nullptr) continue;
      // gRPC takes the call apart once it has been read.
      Leave(number, entry);
      reads.push_back(std::exchange(entry.read, nullptr));
    }
    MakeRoom(now);
  }
  for (const auto& read : reads) read();
}

Arrivals::Counts Arrivals::counts() const {
  absl::MutexLock lock(&mu_);
  int64_t most_streams = 0;
  for (const auto& [peer, streams] : streams_of_) most_streams = std::max(most_streams, streams);
  return {.open = static_cast<int64_t>(open_.size()),
          .late = late_,
          .broken_off = broken_off_,
          .streams = streams_,
          .most_streams = most_streams};
}

Arrivals::Stream::Stream(Arrivals& arrivals, std::string peer)
    : arrivals_(arrivals), peer_(std::move(peer)) {
  absl::MutexLock lock(&arrivals_.mu_);
  ++arrivals_.streams_;
  ++arrivals_.streams_of_[peer_];
}

Arrivals::Stream::~Stream() {
  absl::MutexLock lock(&arrivals_.mu_);
  --arrivals_.streams_;
  const auto of_peer = arrivals_.streams_of_.find(peer_);
  if (--of_peer->second == 0) arrivals_.streams_of_.erase(of_peer);
}

}  // namespace prefilld::wire
