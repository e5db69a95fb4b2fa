// Tests the KV plane under mutual TLS, pulled over several lanes and pushed.
#include <signal.h>

#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/integration/child_process.h"
#include "tests/integration/metrics_page.h"
#include "tests/model/random_checkpoint.h"
#include "tests/proto/test_certificate.h"

namespace prefilld::integration {
namespace {

using ::testing::HasSubstr;
using ::testing::StartsWith;

class Tls : public ::testing::Test {
 protected:
  static std::vector<std::string> ServerFlags(const TestCertificate& self,
                                              const TestCertificate& peer) {
    return {"--tls_cert=" + self.cert_file(), "--tls_key=" + self.key_file(),
            "--tls_client_ca=" + peer.cert_file()};
  }
  std::vector<std::string> PrefilldFlags() const {
    std::vector<std::string> flags = ServerFlags(ours_, ours_);
    flags.insert(flags.end(), {"--model=" + checkpoint_.dir(), "--device=cpu",
                               "--deliver_to_allow=127.0.0.1:*"});
    return flags;
  }
  std::vector<std::string> WorkerFlags() const {
    std::vector<std::string> flags = ServerFlags(ours_, ours_);
    flags.insert(
        flags.end(),
        {"--model=" + checkpoint_.dir(), "--device=cpu", "--kv_pool_tokens=1024",
         "--prefill_address=" + prefilld_.address(), "--prefill_tls", "--lanes=2",
         "--prefill_tls_ca=" + ours_.cert_file(), "--prefill_tls_cert=" + ours_.cert_file(),
         "--prefill_tls_key=" + ours_.key_file()});
    return flags;
  }
  static std::vector<std::string> CliFlags(const TestCertificate& self,
                                           const TestCertificate& peer) {
    return {"--tls",
            "--tls_ca=" + peer.cert_file(),
            "--tls_cert=" + self.cert_file(),
            "--tls_key=" + self.key_file(),
            "--token_ids=1,2,3,4,5",
            "--max_new_tokens=3",
            "--ignore_eos"};
  }

  // Runs prefill-cli with `first` before the common flags, and waits for it to end.
  static std::unique_ptr<ChildProcess> RunCli(std::vector<std::string> first,
                                              const std::vector<std::string>& common) {
    first.insert(first.end(), common.begin(), common.end());
    auto cli = std::make_unique<ChildProcess>("prefill-cli", first);
    EXPECT_TRUE(cli->Wait(absl::Seconds(30)).has_value());
    return cli;
  }

  const TestCertificate ours_;
  const TestCertificate strangers_;
  const model::RandomCheckpoint checkpoint_;
  ServerProcess prefilld_{"prefilld", PrefilldFlags()};
  ServerProcess worker_{"prefilld-decode-worker", WorkerFlags()};
};

TEST_F(Tls, ThePulledCacheIsDecoded) {
  const auto cli = RunCli({"generate", "--worker=" + worker_.address()}, CliFlags(ours_, ours_));
  EXPECT_EQ(cli->Wait(absl::ZeroDuration()), 0) << cli->stderr_text();
}

TEST_F(Tls, ThePushedCacheIsDecoded) {
  ChildProcess generate("prefill-cli", [&] {
    std::vector<std::string> args = CliFlags(ours_, ours_);
    args.insert(args.begin(),
                {"generate", "--worker=" + worker_.address(), "--pushed_transfer_id=t"});
    return args;
  }());
  // Until the worker waits for the transfer, a push of it is refused.
  int exit_code = -1;
  std::string error;
  for (int i = 0; i < 50 && exit_code != 0; ++i) {
    const auto prefill = RunCli({"prefill", "--server=" + prefilld_.address(), "--kv_dtype=fp32",
                                 "--deliver_to=" + worker_.address(), "--transfer_id=t"},
                                CliFlags(ours_, ours_));
    exit_code = *prefill->Wait(absl::ZeroDuration());
    error = prefill->stderr_text();
  }
  EXPECT_EQ(exit_code, 0) << error;
  EXPECT_EQ(generate.Wait(absl::Seconds(20)), 0) << generate.stderr_text();
}

TEST_F(Tls, StrangersAndPlainTextAreTurnedAway) {
  const auto stranger =
      RunCli({"prefill", "--server=" + prefilld_.address()}, CliFlags(strangers_, ours_));
  EXPECT_EQ(stranger->Wait(absl::ZeroDuration()), 3) << stranger->stderr_text();
  const auto trusting_another =
      RunCli({"prefill", "--server=" + prefilld_.address()}, CliFlags(ours_, strangers_));
  EXPECT_EQ(trusting_another->Wait(absl::ZeroDuration()), 3);
  const auto plain = RunCli({"info", "--server=" + prefilld_.address()}, {});
  EXPECT_EQ(plain->Wait(absl::ZeroDuration()), 3);
  EXPECT_THAT(plain->stderr_text(), HasSubstr("UNAVAILABLE"));
}

// The worker's certificate for its calls to prefilld is renewed with the others, without a word.
TEST_F(Tls, RenewedCertificatesAreServedWithoutARestart) {
  const TestCertificate renewed;
  const auto generate = [&] {
    const auto cli =
        RunCli({"generate", "--worker=" + worker_.address()}, CliFlags(renewed, renewed));
    return cli->Wait(absl::ZeroDuration()).value_or(-1);
  };
  EXPECT_EQ(generate(), 3);
  ours_.ReplaceWith(renewed);
  prefilld_.Signal(SIGHUP);
  worker_.Signal(SIGHUP);
  const absl::Time deadline = absl::Now() + absl::Seconds(20);
  int exit_code = -1;
  while (exit_code != 0 && absl::Now() < deadline) exit_code = generate();
  EXPECT_EQ(exit_code, 0) << worker_.stderr_text();
  EXPECT_THAT(prefilld_.stderr_text(), HasSubstr("certificates_reloaded"));
}

// Otherwise an orchestrator would end all servers at one moment, with the requests that go on.
// PortWatch's own test has the connections that a process makes to such a port of its own.
TEST(TlsExpiry, EndsReadinessAndNotLiveness) {
  const TestCertificate own;
  const model::RandomCheckpoint checkpoint;
  const std::vector<std::string> flags = {
      "--model=" + checkpoint.dir(), "--device=cpu", "--tls_cert=" + own.cert_file(),
      "--tls_key=" + own.key_file(), "--tls_client_ca=" + own.cert_file()};
  ServerProcess prefilld("prefilld", flags), worker("prefilld-decode-worker", flags);
  const auto health = [&own](const ServerProcess& server) {
    ChildProcess cli("prefill-cli",
                     {"health", "--server=" + server.address(), "--service=liveness", "--tls",
                      "--tls_ca=" + own.cert_file(), "--tls_cert=" + own.cert_file(),
                      "--tls_key=" + own.key_file()});
    return cli.Wait(absl::Seconds(30)).value_or(-1);
  };
  EXPECT_EQ(health(prefilld), 0);
  EXPECT_EQ(health(worker), 0);
  const TestCertificate brief(-absl::Hours(1), absl::Seconds(12));
  own.ReplaceWith(brief);
  for (ServerProcess* server : {&prefilld, &worker}) {
    server->Signal(SIGHUP);
    // From here on the probe shows and trusts what the server does, so expiry alone makes it fail.
    ASSERT_TRUE(server->AwaitStderr("certificates_reloaded", absl::Seconds(20)))
        << server->stderr_text();
  }
  for (const ServerProcess* server : {&prefilld, &worker}) {
    const absl::Time deadline = absl::Now() + absl::Seconds(60);
    while (health(*server) == 0 && absl::Now() < deadline) absl::SleepFor(absl::Milliseconds(200));
    EXPECT_NE(health(*server), 0) << "it has expired";
    const MetricsPage metrics(server->metrics_address());
    EXPECT_LE(metrics.Value("prefilld_certificate_expiry_timestamp_seconds"),
              absl::ToDoubleSeconds(absl::Now() - absl::UnixEpoch()));
    EXPECT_THAT(MetricsPage(server->metrics_address(), "/live").text(),
                StartsWith("HTTP/1.1 200 OK"));
  }
}

TEST(TlsStart, AnExpiredCertificateIsRefusedByName) {
  const TestCertificate past(-absl::Hours(48), -absl::Hours(24));
  for (const char* program : {"prefilld", "prefilld-decode-worker"}) {
    ChildProcess process(program, {"--model=/no/such", "--tls_cert=" + past.cert_file(),
                                   "--tls_key=" + past.key_file()});
    EXPECT_NE(process.Wait(absl::Seconds(20)).value_or(0), 0);
    EXPECT_THAT(process.stderr_text(), HasSubstr(past.cert_file() + " has expired: valid until"));
  }
}

}  // namespace
}  // namespace prefilld::integration
