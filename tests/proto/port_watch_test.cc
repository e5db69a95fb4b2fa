#include "proto/process/port_watch.h"

#include <unistd.h>

#include <string>

#include <grpcpp/health_check_service_interface.h>
#include <gtest/gtest.h>
#include <prometheus/metric_family.h>
#include <prometheus/registry.h>

#include "absl/functional/function_ref.h"
#include "absl/time/clock.h"
#include "proto/process/health.h"
#include "proto/wire/listener.h"
#include "proto/wire/server_certificates.h"
#include "tests/proto/test_certificate.h"

namespace prefilld::process {
namespace {

constexpr PortWatch::Timing kQuick = {
    .interval = absl::Milliseconds(20), .timeout = absl::Milliseconds(200), .failures = 3};
// It gives no good port up, however busy the machine is.
constexpr PortWatch::Timing kPatient = {
    .interval = absl::Milliseconds(20), .timeout = absl::Seconds(10), .failures = 3};

bool Eventually(absl::FunctionRef<bool()> condition) {
  const absl::Time until = absl::Now() + absl::Seconds(30);
  while (absl::Now() < until) {
    if (condition()) return true;
    absl::SleepFor(absl::Milliseconds(10));
  }
  return condition();
}

// Returns the gauge that alerts look at; -1: there is none.
double ReachableOf(const prometheus::Registry& registry) {
  for (const prometheus::MetricFamily& family : registry.Collect()) {
    if (family.name == "prefilld_reachable") return family.metric.front().gauge.value;
  }
  return -1;
}

TEST(PortWatch, AServerThatAcceptsNobodyIsNotLiveUntilItAcceptsAgain) {
  auto serving = wire::Listener::Create(
      {.address = "127.0.0.1:0", .tls = {}, .max_request_bytes = 1 << 20, .max_streams = 4}, {});
  ASSERT_TRUE(serving.ok()) << serving.status();
  Health health((*serving)->server().GetHealthCheckService(), {});
  // It is bound, and nobody accepts its connections.
  const auto deaf = wire::Connections::Bind("127.0.0.1:0", {});
  ASSERT_TRUE(deaf.ok()) << deaf.status();
  {
    const auto registry = std::make_shared<prometheus::Registry>();
    const PortWatch watch(**deaf, nullptr, health, registry, kQuick);
    EXPECT_TRUE(health.live());
    EXPECT_TRUE(Eventually([&] { return !health.live(); }));
    EXPECT_TRUE(Eventually([&] { return ReachableOf(*registry) == 0; }));
  }
  const auto registry = std::make_shared<prometheus::Registry>();
  const PortWatch watch((*serving)->connections(), nullptr, health, registry, kQuick);
  EXPECT_EQ(ReachableOf(*registry), 1);
  EXPECT_TRUE(Eventually([&] { return health.live(); }));
  EXPECT_EQ(ReachableOf(*registry), 1);
}

// Somebody tidies the folder up, and no new caller finds the socket.
TEST(PortWatch, AProcessWhoseUnixSocketIsGoneIsNotLive) {
  const std::string path = ::testing::TempDir() + "port-watch-" + std::to_string(getpid());
  auto serving = wire::Listener::Create({.address = "127.0.0.1:0,unix:" + path,
                                         .tls = {},
                                         .max_request_bytes = 1 << 20,
                                         .max_streams = 4},
                                        {});
  ASSERT_TRUE(serving.ok()) << serving.status();
  Health health((*serving)->server().GetHealthCheckService(), {});
  const PortWatch watch((*serving)->connections(), nullptr, health,
                        std::make_shared<prometheus::Registry>(), kQuick);
  ASSERT_TRUE(Eventually([&] { return (*serving)->connections().counts().accepted > 9; }));
  EXPECT_TRUE(health.live());
  unlink(path.c_str());
  EXPECT_TRUE(Eventually([&] { return !health.live(); }));
}

TEST(PortWatch, StaysLiveWhileProgressAndPortAreGood) {
  auto serving = wire::Listener::Create(
      {.address = "127.0.0.1:0", .tls = {}, .max_request_bytes = 1 << 20, .max_streams = 4}, {});
  ASSERT_TRUE(serving.ok()) << serving.status();
  Health health((*serving)->server().GetHealthCheckService(), {});
  const PortWatch watch((*serving)->connections(), nullptr, health,
                        std::make_shared<prometheus::Registry>(), kPatient);
  ASSERT_TRUE(Eventually([&] { return (*serving)->connections().counts().accepted > 5; }));
  EXPECT_TRUE(health.live());
  health.SetProgressing(false);
  EXPECT_FALSE(health.live());
  health.SetProgressing(true);
  EXPECT_TRUE(health.live());
}

// An expired certificate ends the handshakes of callers, and a restart would not renew it.
TEST(PortWatch, AProcessWhoseCertificateHasExpiredStaysLive) {
  const TestCertificate own;
  auto serving = wire::Listener::Create(
      {.address = "127.0.0.1:0",
       .tls = {.cert_file = own.cert_file(), .key_file = own.key_file(), .client_ca_file = ""},
       .max_request_bytes = 1 << 20,
       .max_streams = 4},
      {});
  ASSERT_TRUE(serving.ok()) << serving.status();
  // One that has expired already would not be taken.
  wire::ServerCertificates& certificates = *(*serving)->certificates();
  ASSERT_TRUE(Eventually([&] {
    own.ReplaceWith(TestCertificate(-absl::Hours(1), absl::Seconds(3)));
    return certificates.Reload().value_or(false);
  }));
  ASSERT_TRUE(Eventually([&] { return absl::Now() > certificates.expiry(); }));
  Health health((*serving)->server().GetHealthCheckService(), {});
  const PortWatch watch((*serving)->connections(), nullptr, health,
                        std::make_shared<prometheus::Registry>(), kPatient);
  ASSERT_TRUE(Eventually([&] { return (*serving)->connections().counts().accepted > 5; }));
  EXPECT_TRUE(health.live());
}

}  // namespace
}  // namespace prefilld::process
