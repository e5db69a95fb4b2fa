#include "server/receiver_lookup.h"

#include <arpa/inet.h>
#include <netdb.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include <algorithm>
#include <deque>
#include <optional>
#include <thread>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_join.h"
#include "absl/synchronization/mutex.h"
#include "proto/process/log.h"
#include "proto/wire/host_port.h"

namespace prefilld::server {
namespace {

constexpr size_t kMaxLookups = 64;
constexpr char kEvent[] = "receiver_addresses";

struct LookUp {
  std::string request_id;
  std::string receiver;
  std::string host;
};

void LogAddresses(const LookUp& lookup, const std::vector<std::string>& addresses) {
  process::LogEvent(process::LogLevel::kInfo, kEvent,
                    {{"id", lookup.request_id},
                     {"deliver_to", lookup.receiver},
                     {"addresses", addresses.empty() ? "none" : absl::StrJoin(addresses, ",")}});
}

}  // namespace

struct ReceiverLookup::State {
  explicit State(Resolver resolver) : resolver(std::move(resolver)) {}

  const Resolver resolver;
  absl::Mutex mu;
  std::deque<LookUp> waiting ABSL_GUARDED_BY(mu);
  bool stop ABSL_GUARDED_BY(mu) = false;
};

ReceiverLookup::ReceiverLookup(Resolver resolver)
    : state_(std::make_shared<State>(std::move(resolver))) {
  std::thread([state = state_] { Run(state); }).detach();
}

ReceiverLookup::~ReceiverLookup() {
  absl::MutexLock lock(&state_->mu);
  state_->stop = true;
}

void ReceiverLookup::Log(const std::string& request_id, const std::string& receiver) {
  const std::optional<wire::HostPort> place = wire::ParseHostPort(receiver);
  if (!place.has_value() || !place->is_name) return;
  {
    absl::MutexLock lock(&state_->mu);
    if (state_->waiting.size() < kMaxLookups) {
      state_->waiting.push_back({request_id, receiver, place->host});
      return;
    }
  }
  process::LogEvent(process::LogLevel::kWarning, kEvent,
                    {{"id", request_id},
                     {"deliver_to", receiver},
                     {"addresses", "not looked up: too many look-ups wait"}});
}

void ReceiverLookup::Run(const std::shared_ptr<State>& state) {
  while (true) {
    LookUp next;
    {
      absl::MutexLock lock(&state->mu);
      const auto has_work = [&state]() ABSL_SHARED_LOCKS_REQUIRED(state->mu) {
        return state->stop || !state->waiting.empty();
      };
      state->mu.Await(absl::Condition(&has_work));
      if (state->stop) return;
      next = std::move(state->waiting.front());
      state->waiting.pop_front();
    }
    const std::vector<std::string> addresses = state->resolver(next.host);
    // Under the lock, so that nothing is logged once the destructor has returned.
    absl::MutexLock lock(&state->mu);
    if (state->stop) return;
    LogAddresses(next, addresses);
  }
}

std::vector<std::string> ReceiverLookup::Resolve(const std::string& host) {
  addrinfo hints = {};
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  std::vector<std::string> addresses;
  if (getaddrinfo(host.c_str(), nullptr, &hints, &found) != 0) return addresses;
  for (const addrinfo* at = found; at != nullptr; at = at->ai_next) {
    char text[INET6_ADDRSTRLEN] = "";
    const void* address =
        at->ai_family == AF_INET6
            ? static_cast<const void*>(&reinterpret_cast<sockaddr_in6*>(at->ai_addr)->sin6_addr)
            : &reinterpret_cast<sockaddr_in*>(at->ai_addr)->sin_addr;
    inet_ntop(at->ai_family, address, text, sizeof(text));
    if (std::find(addresses.begin(), addresses.end(), text) == addresses.end()) {
      addresses.emplace_back(text);
    }
  }
  freeaddrinfo(found);
  return addresses;
}

}  // namespace prefilld::server
