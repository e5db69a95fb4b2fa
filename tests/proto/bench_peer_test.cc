#include "proto/wire/bench_peer.h"

#include <netinet/in.h>
#include <sys/resource.h>
#include <sys/socket.h>

#include <memory>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"

namespace prefilld::wire {
namespace {

Descriptor NewSocket() { return Descriptor(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)); }

void ConnectTo(int port, const Descriptor& socket) {
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  address.sin_port = htons(static_cast<uint16_t>(port));
  ASSERT_EQ(connect(socket.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
}

TEST(BenchPeer, SendsWhatIsOrderedAndTellsItsUse) {
  const auto peer = BenchPeer::Listen("127.0.0.1:0").value();
  const std::string address = absl::StrCat("127.0.0.1:", peer->port());
  EXPECT_GT(ReceiveOverTcp(address, 3'000'001, 3, 65536).value(), 0.0);
  EXPECT_GT(AskUse(address).value().cpu_us, 0);
}

TEST(BenchPeer, CallersWhoOrderNothingMakeRoomForOthers) {
  const auto peer = BenchPeer::Listen("127.0.0.1:0", absl::Milliseconds(50)).value();
  std::vector<Descriptor> silent;
  for (int i = 0; i < 64; ++i) {
    silent.push_back(NewSocket());
    ConnectTo(peer->port(), silent.back());
  }
  char byte;
  for (const Descriptor& socket : silent) EXPECT_EQ(recv(socket.get(), &byte, 1, 0), 0);
  // The last of them may be about to be let go.
  while (!AskUse(absl::StrCat("127.0.0.1:", peer->port())).ok()) continue;
}

TEST(BenchPeer, NobodyWaitsForAPeerThatSaysNothing) {
  const ListeningSockets silent = ListenOn("127.0.0.1:0").value();
  const auto use = AskUse(absl::StrCat("127.0.0.1:", silent.port), absl::Milliseconds(50));
  EXPECT_EQ(use.status().code(), absl::StatusCode::kUnavailable) << use.status();
}

TEST(BenchPeer, WithoutADescriptorItWaitsForOneAtRest) {
  const auto peer = BenchPeer::Listen("127.0.0.1:0").value();
  const Descriptor caller = NewSocket();
  rlimit limit = {};
  ASSERT_EQ(getrlimit(RLIMIT_NOFILE, &limit), 0);
  const rlimit none = {3, limit.rlim_max};
  ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &none), 0);
  ConnectTo(peer->port(), caller);
  const int64_t before = UseOfThisProcess().cpu_us;
  absl::SleepFor(absl::Milliseconds(500));
  const int64_t used = UseOfThisProcess().cpu_us - before;
  ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &limit), 0);
  EXPECT_LT(used, 50'000);
  const std::vector<uint8_t> order(16);
  ASSERT_EQ(send(caller.get(), order.data(), order.size(), 0), 16);
  std::vector<uint8_t> answer(16);
  EXPECT_EQ(recv(caller.get(), answer.data(), answer.size(), MSG_WAITALL), 16);
}

}  // namespace
}  // namespace prefilld::wire
