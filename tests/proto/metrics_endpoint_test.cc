#include "proto/process/metrics_endpoint.h"

#include <netdb.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <prometheus/gauge.h>
#include <prometheus/registry.h>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"

namespace prefilld::process {
namespace {

using ::testing::HasSubstr;
using ::testing::StartsWith;

constexpr char kScrape[] = "GET /metrics HTTP/1.0\r\n\r\n";

// A connection to a port of this machine that has sent `text`.
class Caller {
 public:
  Caller(const char* host, int port, const std::string& text) {
    addrinfo hints = {};
    hints.ai_flags = AI_NUMERICHOST | AI_NUMERICSERV;
    hints.ai_socktype = SOCK_STREAM;
    addrinfo* found = nullptr;
    if (getaddrinfo(host, absl::StrCat(port).c_str(), &hints, &found) != 0) return;
    fd_ = socket(found->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    const bool connected = connect(fd_, found->ai_addr, found->ai_addrlen) == 0;
    freeaddrinfo(found);
    if (connected) send(fd_, text.data(), text.size(), MSG_NOSIGNAL);
  }
  Caller(Caller&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  ~Caller() {
    if (fd_ >= 0) close(fd_);
  }

  std::string ReadToTheEnd() const {
    std::string text;
    char buffer[4096];
    for (ssize_t n; (n = recv(fd_, buffer, sizeof(buffer), 0)) > 0;) text.append(buffer, n);
    return text;
  }

 private:
  int fd_ = -1;
};

class Endpoint : public ::testing::Test {
 protected:
  Endpoint() {
    prometheus::BuildGauge().Name("answer").Help("h").Register(*registry_).Add({}).Set(42);
  }

  absl::StatusOr<std::unique_ptr<MetricsEndpoint>> Create(const std::string& address) {
    return MetricsEndpoint::Create(address, {registry_});
  }

  const std::shared_ptr<prometheus::Registry> registry_ = std::make_shared<prometheus::Registry>();
};

struct Place {
  const char* listen;
  const char* dial;
};

class EndpointAddress : public Endpoint, public ::testing::WithParamInterface<Place> {};

// A host may have no IPv6 at all; then its addresses cannot be bound, which the flag must say.
bool HasIpv6() {
  const int fd = socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in6 loopback = {};
  loopback.sin6_family = AF_INET6;
  loopback.sin6_addr = in6addr_loopback;
  const bool bound = bind(fd, reinterpret_cast<sockaddr*>(&loopback), sizeof(loopback)) == 0;
  close(fd);
  return bound;
}

TEST_P(EndpointAddress, IsServed) {
  if (GetParam().listen[0] == '[' && !HasIpv6()) {
    EXPECT_EQ(Create(GetParam().listen).status().code(), absl::StatusCode::kUnavailable);
    return;
  }
  const auto endpoint = Create(GetParam().listen);
  ASSERT_TRUE(endpoint.ok()) << endpoint.status();
  const std::string page = Caller(GetParam().dial, (*endpoint)->port(), kScrape).ReadToTheEnd();
  EXPECT_THAT(page, StartsWith("HTTP/1.1 200 OK\r\n"));
  EXPECT_THAT(page, HasSubstr("text/plain; version=0.0.4"));
  EXPECT_THAT(page, HasSubstr("\nanswer 42\n"));
}

INSTANTIATE_TEST_SUITE_P(Kinds, EndpointAddress,
                         ::testing::Values(Place{"127.0.0.1:0", "127.0.0.1"},
                                           Place{"0.0.0.0:0", "127.0.0.1"}, Place{"[::1]:0", "::1"},
                                           Place{"[::]:0", "::1"}, Place{"[::]:0", "127.0.0.1"}));

TEST_F(Endpoint, TakesAName) { EXPECT_TRUE(Create("localhost:0").ok()); }

TEST_F(Endpoint, NamesTheFlagWhenTheAddressCannotBeHad) {
  const auto first = Create("127.0.0.1:0");
  ASSERT_TRUE(first.ok()) << first.status();
  for (const std::string& address :
       {absl::StrCat("127.0.0.1:", (*first)->port()), std::string("203.0.113.1:0"),
        std::string("no.such.host.invalid:0")}) {
    const absl::Status status = Create(address).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable) << address;
    EXPECT_THAT(std::string(status.message()),
                HasSubstr(absl::StrCat("--metrics_listen=", address, " cannot be bound: ")));
  }
}

TEST_F(Endpoint, HasOnePageAndNoOtherMethods) {
  const auto endpoint = Create("127.0.0.1:0");
  const auto answer = [&](const char* request) {
    return Caller("127.0.0.1", (*endpoint)->port(), request).ReadToTheEnd();
  };
  EXPECT_THAT(answer("GET / HTTP/1.0\r\n\r\n"), StartsWith("HTTP/1.1 404"));
  EXPECT_THAT(answer("POST /metrics HTTP/1.0\r\nContent-Length: 4\r\n\r\nbody"),
              StartsWith("HTTP/1.1 405"));
}

TEST_F(Endpoint, TellsWhetherTheProcessIsLiveToThoseWhoAreToKnow) {
  const auto live = std::make_shared<std::atomic<bool>>(true);
  const auto endpoint = MetricsEndpoint::Create("127.0.0.1:0", {registry_}, live);
  const auto ask = [&](const char* request) {
    return Caller("127.0.0.1", (*endpoint)->port(), request).ReadToTheEnd();
  };
  constexpr char kAsk[] = "GET /live HTTP/1.0\r\n\r\n";
  EXPECT_THAT(ask(kAsk), StartsWith("HTTP/1.1 200"));
  *live = false;
  EXPECT_THAT(ask(kAsk), StartsWith("HTTP/1.1 503"));
  EXPECT_THAT(ask(kScrape), StartsWith("HTTP/1.1 200"));
  *live = true;
  EXPECT_THAT(ask("HEAD /live HTTP/1.0\r\n\r\n"), StartsWith("HTTP/1.1 200"));
  EXPECT_THAT(ask("POST /live HTTP/1.0\r\nContent-Length: 4\r\n\r\nbody"),
              StartsWith("HTTP/1.1 405"));
  const auto without = Create("127.0.0.1:0");
  EXPECT_THAT(Caller("127.0.0.1", (*without)->port(), kAsk).ReadToTheEnd(),
              StartsWith("HTTP/1.1 404"));
}

// Callers that occupy the endpoint in each way there is: they say nothing, stop in the middle of a
// request, or take no answer.
TEST_F(Endpoint, CallersThatStopDelayNobody) {
  // A page that no socket's buffer holds.
  auto& family = prometheus::BuildGauge().Name("many").Help("h").Register(*registry_);
  const std::string padding(1000, 'x');
  for (int i = 0; i < 10'000; ++i) family.Add({{"i", absl::StrCat(i, padding)}});
  const auto endpoint = Create("127.0.0.1:0");
  ASSERT_TRUE(endpoint.ok()) << endpoint.status();
  for (const char* text : {"", "GET /metrics HTTP/1.1\r\nHost: h", kScrape}) {
    // With an answer that is not read, each connection holds a page of ten megabytes.
    const int count = text == std::string(kScrape) ? 5 : 300;
    std::vector<Caller> stopped;
    for (int i = 0; i < count; ++i) stopped.emplace_back("127.0.0.1", (*endpoint)->port(), text);
    const absl::Time start = absl::Now();
    const std::string page = Caller("127.0.0.1", (*endpoint)->port(), kScrape).ReadToTheEnd();
    EXPECT_THAT(page, HasSubstr("\nanswer 42\n")) << "after " << count << " of: " << text;
    EXPECT_LT(absl::Now() - start, absl::Seconds(10)) << "after " << count << " of: " << text;
  }
}

TEST_F(Endpoint, ASilentCallerIsLetGo) {
  const auto endpoint = Create("127.0.0.1:0");
  const Caller silent("127.0.0.1", (*endpoint)->port(), "GET /met");
  const absl::Time start = absl::Now();
  silent.ReadToTheEnd();
  EXPECT_LT(absl::Now() - start, absl::Seconds(15));
}

TEST_F(Endpoint, WaitsForAReaderOfANewPage) {
  const auto endpoint = Create("127.0.0.1:0");
  const auto ask = [&](const char* request) {
    return Caller("127.0.0.1", (*endpoint)->port(), request).ReadToTheEnd();
  };
  ask(kScrape);
  absl::Notification returned;
  std::thread waiter([&] {
    (*endpoint)->AwaitReader(absl::Seconds(60));
    returned.Notify();
  });
  ask("HEAD /metrics HTTP/1.0\r\n\r\n");
  ask("GET / HTTP/1.0\r\n\r\n");
  EXPECT_FALSE(returned.WaitForNotificationWithTimeout(absl::Milliseconds(200)));
  ask(kScrape);
  EXPECT_TRUE(returned.WaitForNotificationWithTimeout(absl::Seconds(30)));
  waiter.join();
}

TEST_F(Endpoint, WaitsNoLongerThanItMayForAReader) {
  const auto endpoint = Create("127.0.0.1:0");
  Caller("127.0.0.1", (*endpoint)->port(), kScrape).ReadToTheEnd();
  const absl::Time start = absl::Now();
  (*endpoint)->AwaitReader(absl::Milliseconds(200));
  EXPECT_GE(absl::Now() - start, absl::Milliseconds(200));
}

TEST_F(Endpoint, WaitsForNobodyWhereNobodyReads) {
  const auto endpoint = Create("127.0.0.1:0");
  const absl::Time start = absl::Now();
  (*endpoint)->AwaitReader(absl::Seconds(60));
  EXPECT_LT(absl::Now() - start, absl::Seconds(30));
}

}  // namespace
}  // namespace prefilld::process
