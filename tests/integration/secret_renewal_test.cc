// Tests that tokens and certificates are renewed under load, without one failed request, and that a
// decode worker shows its token.
#include <signal.h>

#include <atomic>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/integration/access_server.h"

namespace prefilld::integration {
namespace {

using ::testing::HasSubstr;

// Callers that make a connection for each call, and callers that keep theirs, until destruction.
class Load {
 public:
  explicit Load(const AccessServer& server) {
    for (int i = 0; i < 4; ++i) {
      callers_.emplace_back([this, &server, keeps_connection = i % 2 == 0] {
        const client::ChannelOptions options = server.Options(server.Path("token"));
        const auto kept = client::PrefillClient::Create(options);
        while (!stop_) {
          Note(keeps_connection ? AccessServer::Call(**kept) : server.CallWith(options));
        }
      });
    }
  }
  ~Load() { Stop(); }
  void Stop() {
    stop_ = true;
    for (std::thread& caller : callers_) caller.join();
    callers_.clear();
  }

  void AwaitCalls(int more) const {
    const int until = calls_ + more;
    const absl::Time deadline = absl::Now() + kSoon;
    while (calls_ < until && absl::Now() < deadline) absl::SleepFor(absl::Milliseconds(5));
    EXPECT_GE(calls_, until);
  }
  int calls() const { return calls_; }
  std::vector<absl::Status> failures() {
    absl::MutexLock lock(&mu_);
    return failures_;
  }

 private:
  void Note(const absl::Status& status) {
    ++calls_;
    if (status.ok()) return;
    absl::MutexLock lock(&mu_);
    failures_.push_back(status);
  }

  std::atomic<bool> stop_ = false;
  std::atomic<int> calls_ = 0;
  absl::Mutex mu_;
  std::vector<absl::Status> failures_ ABSL_GUARDED_BY(mu_);
  std::vector<std::thread> callers_;
};

TEST(Renewal, OfTokensAndCertificatesUnderLoadFailsNoRequest) {
  AccessServer server;
  Load load(server);
  load.AwaitCalls(20);
  server.WriteTenants({kSesameHash, kBarleyHash});  // both tokens count
  EXPECT_TRUE(server.SoonAtLeast("prefilld_tenants_reloads_total{result=\"ok\"}", 1));
  server.Write("token", "barley\n");
  absl::SleepFor(absl::Seconds(1.2));  // clients let a file rest for a second
  load.AwaitCalls(80);
  server.own.ReplaceWith(server.after);
  server.WriteTenants({kBarleyHash});  // the old token counts no more
  server.process().Signal(SIGHUP);
  EXPECT_TRUE(server.SoonAtLeast("prefilld_tenants_reloads_total{result=\"ok\"}", 2));
  EXPECT_TRUE(server.SoonAtLeast("prefilld_certificate_reloads_total{result=\"ok\"}", 1));
  server.Write("tenants.json", "{\"tenants\": [");  // somebody's slip
  EXPECT_TRUE(server.SoonAtLeast("prefilld_tenants_reloads_total{result=\"refused\"}", 1));
  load.AwaitCalls(40);
  load.Stop();
  RecordProperty("calls", load.calls());
  for (const absl::Status& failure : load.failures()) ADD_FAILURE() << failure;

  EXPECT_EQ(server.CallWithToken("sesame").code(), absl::StatusCode::kUnauthenticated);
  client::ChannelOptions trusting = server.Options(server.Path("token"));
  trusting.tls->ca_file = server.after.cert_file();
  EXPECT_EQ(server.CallWith(trusting), absl::OkStatus()) << "the new certificate is shown";
  EXPECT_THAT(server.process().stderr_text(), HasSubstr("tenants_refused"));
}

TEST(DecodeWorker, ShowsItsTokenToPrefilldAndToNobodyElse) {
  AccessServer server;
  ServerProcess worker(
      "prefilld-decode-worker",
      {"--model=" + server.checkpoint().dir(), "--device=cpu", "--kv_pool_tokens=1024", "--lanes=2",
       "--prefill_address=" + server.process().address(), "--prefill_tls",
       "--prefill_tls_ca=" + server.Path("bundle.pem"),
       "--prefill_tls_cert=" + server.caller.cert_file(),
       "--prefill_tls_key=" + server.caller.key_file(),
       "--prefill_token_file=" + server.Path("token")});
  ChildProcess cli("prefill-cli", {"generate", "--worker=" + worker.address(), "--token_ids=1,2,3",
                                   "--max_new_tokens=2", "--ignore_eos"});
  EXPECT_EQ(cli.Wait(kSoon), 0) << cli.stderr_text();
  EXPECT_TRUE(server.SoonAtLeast("prefilld_tenant_requests_total{tenant=\"ours\"}", 1));
  const std::string command_line = ContentOf(absl::StrCat("/proc/", worker.pid(), "/cmdline"));
  EXPECT_THAT(command_line, HasSubstr("--prefill_token_file="));
  EXPECT_EQ(command_line.find("sesame"), std::string::npos) << "anybody on the machine reads this";
}

}  // namespace
}  // namespace prefilld::integration
