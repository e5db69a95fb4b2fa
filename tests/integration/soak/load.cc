#include "tests/integration/soak/load.h"

#include <signal.h>
#include <sys/socket.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <functional>
#include <memory>
#include <random>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "client/prefill_client.h"
#include "proto/wire/grpc_status.h"
#include "tests/integration/child_process.h"
#include "tests/integration/generate_client.h"
#include "tests/integration/metrics_page.h"
#include "tests/integration/tcp.h"

namespace prefilld::integration {
namespace {

using absl::StatusCode;
using client::PrefillClient;

class NullSink : public client::KvSink {
 public:
  absl::Status OnAccepted(const ::prefill::v1::Accepted&) override { return absl::OkStatus(); }
  absl::Status OnProgress(const ::prefill::v1::Progress&) override { return absl::OkStatus(); }
  absl::Status OnFrame(const wire::ReceivedFrame&) override { return absl::OkStatus(); }
};

// One of those who make up the load, with chances of its own.
class Actor {
 public:
  Actor(const LoadOptions& options, const KnownAnswers& known, Tally& tally, absl::Time until,
        int number)
      : options_(options),
        known_(known),
        tally_(tally),
        until_(until),
        number_(number),
        random_(static_cast<uint32_t>(number)),
        client_(*PrefillClient::Create({.address = options.prefilld})) {}

  bool goes_on() const { return absl::Now() < until_; }

  void Pull() {
    // Connections come and go, too.
    if (Chance(10)) client_ = *PrefillClient::Create({.address = options_.prefilld});
    tally_.Count("pull", known_.Check(*client_, Ask({.lanes = 1 + Below(3)})),
                 {StatusCode::kResourceExhausted});
  }

  void PullSlowly() {
    tally_.Count("slow reader",
                 known_.Check(*client_,
                              Ask({.delay = absl::Milliseconds(10 + static_cast<int>(Below(40)))})),
                 {StatusCode::kResourceExhausted});
  }

  // The id of a cancelled request is used again at once.
  void CancelAndComeBack() {
    const std::string id = absl::StrCat("again-", number_, "-", ++calls_);
    client::Cancellation cancellation;
    std::thread canceller([&cancellation, wait = Below(300)] {
      absl::SleepFor(absl::Milliseconds(static_cast<int>(wait)));
      cancellation.Cancel();
    });
    tally_.Count("cancelled",
                 known_.Check(*client_, Ask({.id = id, .cancellation = &cancellation})),
                 {StatusCode::kCancelled, StatusCode::kResourceExhausted});
    tally_.Count("cancelled, again", known_.Check(*client_, Ask({.id = id})),
                 {StatusCode::kResourceExhausted});
    canceller.join();
  }

  void MissDeadline() {
    const absl::Time deadline = absl::Now() + absl::Milliseconds(1 + static_cast<int>(Below(80)));
    tally_.Count("short deadline", known_.Check(*client_, Ask({.deadline = deadline})),
                 {StatusCode::kDeadlineExceeded, StatusCode::kResourceExhausted});
  }

  void AskNonsense() {
    NullSink sink;
    ::prefill::v1::PrefillRequest request = known_.Request(Below(known_.size()));
    if (Chance(2)) request.clear_token_ids();
    request.mutable_layout()->set_block_tokens(17);
    const absl::Status status = client_->Prefill(request, sink).status();
    tally_.Count("bad request", status.ok() ? absl::InternalError("was taken") : status,
                 {StatusCode::kInvalidArgument});
    absl::SleepFor(absl::Milliseconds(50));
  }

  void PushToNobody() {
    NullSink sink;
    ::prefill::v1::PrefillRequest request = known_.Request(Below(known_.size()));
    request.mutable_deliver_to()->set_address("127.0.0.1:9");
    request.mutable_deliver_to()->set_transfer_id("nobody");
    const absl::Status status =
        client_->Prefill(request, sink, {.metadata = {{"x-tenant", "b"}}}).status();
    tally_.Count("push to nobody", status.ok() ? absl::InternalError("went well") : status,
                 {StatusCode::kUnavailable, StatusCode::kResourceExhausted});
    absl::SleepFor(absl::Milliseconds(100));
  }

  void Generate() {
    const size_t prompt = Below(kShortPrompts);
    const auto tokens = AskWorker(options_, known_, prompt);
    tally_.Count("generate", Compared(tokens, prompt), {StatusCode::kResourceExhausted});
  }

  // A caller of the worker, and a router that has the cache pushed to it.
  void GenerateFromPush(const std::string& worker, bool may_die) {
    const size_t prompt = Below(kShortPrompts);
    const ::prefill::v1::PrefillRequest known = known_.Request(prompt);
    ::prefill::v1::GenerateRequest request = DenseRequest(
        {known.token_ids().begin(), known.token_ids().end()}, options_.generated_tokens);
    request.set_pushed_transfer_id(absl::StrCat("push-", number_, "-", ++calls_));
    ::prefill::v1::PrefillRequest push = known;
    push.mutable_deliver_to()->set_address(worker);
    push.mutable_deliver_to()->set_transfer_id(request.pushed_transfer_id());
    absl::Status pushed = absl::UnavailableError("the worker did not start");
    std::thread router;
    const Generation generation = integration::Generate(
        worker, request, [&](const ::prefill::v1::GenerateEvent& event, grpc::ClientContext& call) {
          if (!event.has_started() || router.joinable()) return;
          *push.mutable_layout() = event.started().kv_layout();
          router = std::thread([&] {
            NullSink sink;
            pushed = client_->Prefill(push, sink, {.metadata = {{"x-tenant", "a"}}}).status();
            // The one who waits for the cache would wait in vain.
            if (!pushed.ok()) call.TryCancel();
          });
        });
    if (router.joinable()) router.join();
    const absl::Status status = wire::FromGrpc(generation.status);
    if (may_die || absl::IsResourceExhausted(pushed)) {
      return tally_.Count(may_die ? "push to a victim" : "push",
                          status.ok() ? Compared(generation.tokens, prompt) : status,
                          {StatusCode::kUnavailable, StatusCode::kDeadlineExceeded,
                           StatusCode::kCancelled, StatusCode::kResourceExhausted});
    }
    tally_.Count("push", status.ok() ? Compared(generation.tokens, prompt) : status,
                 {StatusCode::kResourceExhausted});
  }

  void KillConsumer() {
    ChildProcess consumer("prefill-cli", ConsumerFlags());
    absl::SleepFor(absl::Milliseconds(20 + static_cast<int>(Below(800))));
    consumer.Signal(SIGKILL);
    consumer.Wait(absl::Seconds(10));
    tally_.Count("killed consumer", absl::OkStatus());
  }

  // Longer than the server bears it.
  void StopConsumer() {
    ChildProcess consumer("prefill-cli", ConsumerFlags());
    absl::SleepFor(absl::Milliseconds(100 + static_cast<int>(Below(400))));
    consumer.Signal(SIGSTOP);
    absl::SleepFor(absl::Seconds(5));
    consumer.Signal(Chance(2) ? SIGKILL : SIGCONT);
    consumer.Wait(absl::Seconds(30));
    tally_.Count("stopped consumer", absl::OkStatus());
  }

  // A worker that is stopped or killed while it pulls, or while a cache is pushed to it.
  void HarmWorker() {
    ServerProcess victim("prefilld-decode-worker", options_.worker_flags);
    std::vector<std::thread> callers;
    for (int i = 0; i < 2; ++i) {
      callers.emplace_back([&, i, seed = random_()] {
        Actor caller(options_, known_, tally_, until_, static_cast<int>(seed % 100'000));
        if (i == 0) return caller.GenerateFromPush(victim.address(), /*may_die=*/true);
        LoadOptions options = options_;
        options.worker = victim.address();
        tally_.Count("pull of a victim", AskWorker(options, known_, 0).status(),
                     {StatusCode::kUnavailable, StatusCode::kResourceExhausted});
      });
    }
    absl::SleepFor(absl::Milliseconds(static_cast<int>(Below(500))));
    if (Chance(2)) {
      victim.Signal(SIGSTOP);
      absl::SleepFor(absl::Seconds(4));
    }
    victim.Signal(SIGKILL);
    victim.Wait(absl::Seconds(10));
    for (std::thread& caller : callers) caller.join();
  }

  // Connections that say nothing, and requests of which half comes.
  void KeepHalfRequests() {
    // HTTP/2: the preface and SETTINGS; HEADERS of a call of GetServerInfo with literal fields;
    // DATA with a message of a megabyte, of which this is the beginning.
    constexpr char kPreface[] = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0";
    const auto field = [](const std::string& name, const std::string& value) {
      return absl::StrCat(std::string(1, '\0'), std::string(1, static_cast<char>(name.size())),
                          name, std::string(1, static_cast<char>(value.size())), value);
    };
    const std::string headers =
        absl::StrCat("\x83\x86", field(":path", "/prefill.v1.PrefillService/GetServerInfo"),
                     field(":authority", "soak"), field("te", "trailers"),
                     field("content-type", "application/grpc"));
    const std::string data = absl::StrCat(std::string("\0\0\x0f\x42\x40", 5), std::string(60, 'x'));
    const auto frame = [](const std::string& payload, char type, char flags) {
      const char header[] = {0, 0, static_cast<char>(payload.size()), type, flags, 0, 0, 0, 1};
      return absl::StrCat(std::string(header, sizeof header), payload);
    };
    const std::string half = absl::StrCat(std::string(kPreface, sizeof kPreface - 1),
                                          frame(headers, 1, 4), frame(data, 0, 0));
    std::vector<TcpSocket> sockets;
    for (int i = 0; i < 20; ++i) {
      sockets.push_back(TcpSocket::Connect(options_.prefilld));
      if (i % 2 == 0) continue;
      (void)!send(sockets.back().descriptor(), half.data(), half.size(), MSG_NOSIGNAL);
    }
    absl::SleepFor(absl::Seconds(7));  // longer than a request may take
    tally_.Count("half requests", absl::OkStatus());
  }

  void WatchMetrics() {
    const MetricsPage page(options_.prefilld_metrics);
    const bool good = page.Value("prefilld_live") == 1 && page.Value("prefilld_ready") == 1;
    tally_.Count("health", good ? absl::OkStatus() : absl::InternalError("is not good"));
    absl::SleepFor(absl::Milliseconds(300));
  }

  const std::string& worker() const { return options_.worker; }

 private:
  uint32_t Below(size_t bound) { return static_cast<uint32_t>(random_() % bound); }
  bool Chance(uint32_t one_in) { return Below(one_in) == 0; }

  KnownAnswers::Ask Ask(KnownAnswers::Ask ask) {
    ask.prompt = Below(known_.size());
    ask.bypass_prefix_cache = Chance(2);
    ask.tenant = std::string(1, Chance(2) ? 'a' : 'b');
    return ask;
  }

  absl::Status Compared(const absl::StatusOr<std::vector<uint32_t>>& tokens, size_t prompt) const {
    if (!tokens.ok()) return tokens.status();
    if (*tokens == options_.generated[prompt]) return absl::OkStatus();
    return absl::DataLossError(absl::StrCat("prompt ", prompt, ": other tokens"));
  }

  std::vector<std::string> ConsumerFlags() {
    return {"prefill",
            "--server=" + options_.prefilld,
            "--policy=dense",
            "--quiet",
            "--timeout_s=20",
            "--metadata=x-tenant=b",
            "--token_ids_file=" + options_.prompt_file,
            absl::StrCat("--lanes=", 1 + Below(3))};
  }

  const LoadOptions& options_;
  const KnownAnswers& known_;
  Tally& tally_;
  const absl::Time until_;
  const int number_;
  std::minstd_rand random_;
  std::unique_ptr<PrefillClient> client_;
  int calls_ = 0;
};

}  // namespace

void Tally::Count(const std::string& who, const absl::Status& status,
                  std::initializer_list<StatusCode> accepted) {
  absl::MutexLock lock(&mu_);
  ++ends_[who][absl::StatusCodeToString(status.code())];
  if (status.ok() || std::find(accepted.begin(), accepted.end(), status.code()) != accepted.end()) {
    return;
  }
  if (++failures_ <= 20) {
    std::fprintf(stderr, "FAILURE of %s: %s\n", who.c_str(), status.ToString().c_str());
  }
}

void Tally::Print() const {
  absl::MutexLock lock(&mu_);
  for (const auto& [who, ends] : ends_) {
    std::printf("  %-18s", who.c_str());
    for (const auto& [code, count] : ends) {
      std::printf("  %s %lld", code.c_str(), static_cast<long long>(count));
    }
    std::printf("\n");
  }
}

int64_t Tally::failures() const {
  absl::MutexLock lock(&mu_);
  return failures_;
}

absl::StatusOr<std::vector<uint32_t>> AskWorker(const LoadOptions& options,
                                                const KnownAnswers& known, size_t prompt) {
  const ::prefill::v1::PrefillRequest request = known.Request(prompt);
  Generation generation = Generate(
      options.worker, DenseRequest({request.token_ids().begin(), request.token_ids().end()},
                                   options.generated_tokens));
  if (!generation.status.ok()) return wire::FromGrpc(generation.status);
  return std::move(generation.tokens);
}

void RunLoad(const LoadOptions& options, const KnownAnswers& known, absl::Duration time,
             Tally& tally) {
  using Act = std::function<void(Actor&)>;
  const std::vector<Act> everybody = {
      &Actor::Pull,
      &Actor::Pull,
      &Actor::PullSlowly,
      &Actor::CancelAndComeBack,
      &Actor::CancelAndComeBack,
      &Actor::MissDeadline,
      &Actor::AskNonsense,
      &Actor::PushToNobody,
      &Actor::Generate,
      [](Actor& actor) { actor.GenerateFromPush(actor.worker(), /*may_die=*/false); },
      &Actor::KillConsumer,
      &Actor::StopConsumer,
      &Actor::HarmWorker,
      &Actor::KeepHalfRequests,
      &Actor::WatchMetrics};
  const absl::Time until = absl::Now() + time;
  std::vector<std::thread> threads;
  for (size_t i = 0; i < everybody.size(); ++i) {
    threads.emplace_back([&, i] {
      Actor actor(options, known, tally, until, static_cast<int>(i + 1));
      while (actor.goes_on()) everybody[i](actor);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace prefilld::integration
