// Tests tenants of a real server: a flood of one beside another, and the three ways to tell callers
// apart.
#include <stdlib.h>

#include <algorithm>
#include <atomic>
#include <filesystem>
#include <fstream>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "client/prefill_client.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "proto/wire/grpc_status.h"
#include "tests/integration/child_process.h"
#include "tests/integration/metrics_page.h"
#include "tests/model/prompt_run.h"
#include "tests/model/random_checkpoint.h"
#include "tests/proto/test_certificate.h"

namespace prefilld::integration {
namespace {

using ::prefill::v1::PrefillRequest;
using ::testing::HasSubstr;
using ::testing::Not;

// "sesame", as SHA-256.
constexpr char kSesameHash[] = "d0c04f4b1951e4aeaaec8223ed2039e542f3aae805a6fa7f6d794e5afff5d272";

constexpr absl::Duration kSoon = absl::Seconds(30);

const std::string kCertificateName = "localhost";  // of test_certificate.h

// A file of tenants that is removed with this object.
class TenantsFile {
 public:
  explicit TenantsFile(const std::string& json) {
    folder_ = (std::filesystem::temp_directory_path() / "prefilld-tenants-XXXXXX").string();
    if (mkdtemp(folder_.data()) == nullptr) abort();
    Write("tenants.json", json);
  }
  ~TenantsFile() { std::filesystem::remove_all(folder_); }
  std::string Write(const std::string& name, const std::string& content) const {
    const std::string path = folder_ + "/" + name;
    std::ofstream(path) << content;
    return path;
  }
  std::string flag() const { return "--tenants=" + folder_ + "/tenants.json"; }

 private:
  std::string folder_;
};

model::ModelConfig Config() {
  model::ModelConfig config = model::SmallRandomConfig();
  config.num_layers = 8;
  config.max_positions = 8192;
  return config;
}

class Taking : public client::KvSink {
 public:
  absl::Status OnAccepted(const ::prefill::v1::Accepted& accepted) override {
    priority = accepted.priority();
    return absl::OkStatus();
  }
  absl::Status OnProgress(const ::prefill::v1::Progress&) override { return absl::OkStatus(); }
  absl::Status OnFrame(const wire::ReceivedFrame&) override { return absl::OkStatus(); }

  int priority = 0;
};

class TenantsTest : public ::testing::Test {
 protected:
  PrefillRequest Request(int num_tokens) const {
    PrefillRequest request;
    const auto tokens = model::RandomTokens(num_tokens, Config().vocab_size, 1);
    request.mutable_token_ids()->Assign(tokens.begin(), tokens.end());
    request.mutable_attention()->set_policy(::prefill::v1::ATTENTION_POLICY_DENSE);
    return request;
  }
  std::vector<std::string> Flags(const std::vector<std::string>& more) const {
    std::vector<std::string> flags = {"--model=" + checkpoint_.dir(), "--device=cpu",
                                      "--cpu_threads=1"};
    flags.insert(flags.end(), more.begin(), more.end());
    return flags;
  }
  static absl::Status Prefill(const ServerProcess& server, const PrefillRequest& request,
                              const client::Metadata& metadata, Taking* taking = nullptr) {
    Taking own;
    auto client = client::PrefillClient::Create({.address = server.address()});
    EXPECT_TRUE(client.ok());
    return (*client)
        ->Prefill(request, taking == nullptr ? own : *taking,
                  {.deadline = absl::Now() + absl::Minutes(5), .metadata = metadata})
        .status();
  }

  const model::RandomCheckpoint checkpoint_{Config()};
};

absl::Duration Median(std::vector<absl::Duration> times) {
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

TEST_F(TenantsTest, AFloodDelaysItselfAndNotTheOtherTenant) {
  const TenantsFile file(R"({"tenants": [{"name": "flood"}, {"name": "visitor"}]})");
  ServerProcess server("prefilld",
                       Flags({file.flag(), "--tenant_from=metadata", "--queue_capacity=12"}));
  const PrefillRequest request = Request(1000);
  std::atomic<bool> stop = false;
  std::atomic<int> refusals = 0;
  std::vector<std::vector<absl::Duration>> flood_times(24);  // by caller
  std::vector<std::thread> flood;
  for (auto& times : flood_times) {
    flood.emplace_back([&] {
      while (!stop) {
        const absl::Time start = absl::Now();
        const absl::Status status = Prefill(server, request, {{"x-tenant", "flood"}});
        if (status.ok()) {
          times.push_back(absl::Now() - start);
          continue;
        }
        EXPECT_THAT(status.message(), HasSubstr("the queue is full for tenant flood"));
        EXPECT_TRUE(wire::RetryDelay(status).has_value());
        ++refusals;
        absl::SleepFor(absl::Milliseconds(50));
      }
    });
  }
  while (refusals == 0) absl::SleepFor(absl::Milliseconds(5));  // the queue is full
  std::vector<absl::Duration> visits;
  for (int i = 0; i < 15; ++i) {
    const absl::Time start = absl::Now();
    EXPECT_EQ(Prefill(server, request, {{"x-tenant", "visitor"}}), absl::OkStatus());
    visits.push_back(absl::Now() - start);
  }
  stop = true;
  for (std::thread& caller : flood) caller.join();
  std::vector<absl::Duration> flooded;
  for (const auto& times : flood_times) flooded.insert(flooded.end(), times.begin(), times.end());
  RecordProperty("visitor_median_ms", absl::ToInt64Milliseconds(Median(visits)));
  RecordProperty("flood_median_ms", absl::ToInt64Milliseconds(Median(flooded)));
  // Nine requests of the flood wait for each other, and the visitor waits for one at most.
  EXPECT_LT(Median(visits), 0.5 * Median(flooded));

  // The server counts a call after its caller has the end of it.
  EXPECT_TRUE(WaitForMetrics(server.metrics_address(), kSoon, [&](const MetricsPage& page) {
    return page.Value("prefilld_tenant_requests_total{tenant=\"visitor\"}") == 15 &&
           page.Value("prefilld_tenant_refused_total{tenant=\"flood\"}") == refusals;
  }));
  const MetricsPage page(server.metrics_address());
  EXPECT_EQ(page.Value("prefilld_tenant_requests_total{tenant=\"visitor\"}"), 15);
  EXPECT_EQ(page.Value("prefilld_tenant_prompt_tokens_total{tenant=\"visitor\"}"), 15'000);
  EXPECT_EQ(page.Value("prefilld_tenant_refused_total{tenant=\"visitor\"}"), 0);
  EXPECT_EQ(page.Value("prefilld_tenant_refused_total{tenant=\"flood\"}"), refusals);
  EXPECT_GT(page.Value("prefilld_tenant_device_seconds_total{tenant=\"visitor\"}"), 0);
  EXPECT_EQ(page.Value("prefilld_tenant_requests_total{tenant=\"default\"}"), 0);
}

TEST_F(TenantsTest, TokensAreKnownByTheirHashesAndStrangersAreRefused) {
  const TenantsFile file(absl::StrCat(
      R"({"unknown": "refuse", "tenants": [{"name": "ali baba", "max_priority": 2,
          "tokens_per_second": 2, "token_sha256": [")",
      kSesameHash, R"("]}]})"));
  ServerProcess server("prefilld", Flags({file.flag(), "--tenant_from=token"}));
  const client::Metadata sesame = {{"authorization", "Bearer sesame"}};
  PrefillRequest request = Request(20);
  request.set_priority(5);
  Taking taking;
  EXPECT_EQ(Prefill(server, request, sesame, &taking), absl::OkStatus());
  EXPECT_EQ(taking.priority, 2) << "what the operator allows";

  const absl::Status limited = Prefill(server, request, sesame);
  EXPECT_EQ(limited.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(limited.message(), HasSubstr("tenant ali baba: 20 tokens came"));
  EXPECT_THAT(limited.message(), HasSubstr("at most 2 a second (tokens_per_second)"));
  EXPECT_LE(*wire::RetryDelay(limited), absl::Seconds(10));

  for (const client::Metadata& stranger :
       {client::Metadata{}, client::Metadata{{"authorization", "Bearer sesam"}},
        client::Metadata{{"authorization", absl::StrCat("Bearer ", kSesameHash)}},
        client::Metadata{{"x-tenant", "ali baba"}}}) {
    EXPECT_EQ(Prefill(server, request, stranger).code(), absl::StatusCode::kUnauthenticated);
  }
  request.set_priority(8);
  EXPECT_THAT(Prefill(server, request, sesame).message(), HasSubstr("priority 8; from -7 to 7"));

  const std::string token_file = file.Write("token", "sesam\n");
  ChildProcess careful("prefill-cli", {"prefill", "--server=" + server.address(), "--token_ids=1,2",
                                       "--token_file=" + token_file});
  EXPECT_EQ(careful.Wait(absl::Seconds(30)), 2);
  EXPECT_THAT(careful.stderr_text(), HasSubstr("in plain text"));
  ChildProcess cli("prefill-cli", {"prefill", "--server=" + server.address(), "--token_ids=1,2",
                                   "--token_file=" + token_file, "--token_without_tls"});
  EXPECT_NE(cli.Wait(absl::Seconds(30)), 0);
  EXPECT_THAT(cli.stderr_text(), HasSubstr("UNAUTHENTICATED"));
  EXPECT_TRUE(WaitForMetrics(server.metrics_address(), kSoon, [](const MetricsPage& page) {
    return page.Value("prefilld_requests_total{outcome=\"unauthenticated\"}") == 5;
  }));
  EXPECT_TRUE(server.AwaitStderr("tenant=\"ali baba\" priority=2", kSoon)) << server.stderr_text();
  EXPECT_THAT(server.stderr_text(), Not(HasSubstr("sesam")));
}

TEST_F(TenantsTest, TheNameInTheCertificateIsTheTenant) {
  const TestCertificate certificate;
  const TenantsFile file(R"({"tenants": [{"name": ")" + kCertificateName +
                         R"(", "max_requests": 3}]})");
  ServerProcess server(
      "prefilld",
      Flags({file.flag(), "--tenant_from=certificate", "--tls_cert=" + certificate.cert_file(),
             "--tls_key=" + certificate.key_file(), "--tls_client_ca=" + certificate.cert_file()}));
  ChildProcess cli("prefill-cli",
                   {"prefill", "--server=" + server.address(), "--token_ids=1,2,3", "--tls",
                    "--tls_ca=" + certificate.cert_file(), "--tls_cert=" + certificate.cert_file(),
                    "--tls_key=" + certificate.key_file(), "--metadata=x-tenant=default"});
  EXPECT_EQ(cli.Wait(absl::Seconds(30)), 0) << cli.stderr_text();
  EXPECT_TRUE(WaitForMetrics(server.metrics_address(), kSoon, [&](const MetricsPage& page) {
    return page.Value("prefilld_tenant_requests_total{tenant=\"" + kCertificateName + "\"}") == 1;
  }));
}

TEST_F(TenantsTest, AWrongTableStopsTheStart) {
  const TenantsFile file(R"({"tenants": [{"name": "a", "weight": -1}]})");
  ChildProcess process("prefilld", Flags({file.flag(), "--tenant_from=metadata"}));
  EXPECT_NE(process.Wait(absl::Seconds(20)).value_or(0), 0);
  EXPECT_THAT(process.stderr_text(), HasSubstr("weight is -1; a number from 1e-06 to 1e+06"));
}

}  // namespace
}  // namespace prefilld::integration
