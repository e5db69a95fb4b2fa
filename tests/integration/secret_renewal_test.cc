// Tests that tokens and certificates are renewed under load, without one failed request, and that a
// decode worker shows its token.
#include <fcntl.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <filesystem>
#include <string>
#include <thread>
#include <utility>
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
  Load(const AccessServer& server, const client::ChannelOptions& options) {
    for (int i = 0; i < 4; ++i) {
      callers_.emplace_back([this, &server, options, keeps_connection = i % 2 == 0] {
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
  Load load(server, server.Options(server.Path("token")));
  load.AwaitCalls(20);
  server.WriteTenants({kSesameHash, kBarleyHash});  // both tokens count
  EXPECT_TRUE(server.SoonAtLeast("prefilld_tenants_reloads_total{result=\"ok\"}", 1));
  server.Write("token", "barley\n");
  // Clients look at the file once a second, and let it rest for one.
  absl::SleepFor(absl::Seconds(2.2));
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

// A folder of two files that change together, as the kubelet mounts a Secret.
class MountedCertificate {
 public:
  explicit MountedCertificate(std::string folder) : folder_(std::move(folder)) {}
  std::string cert_file() const { return folder_ + "/tls.crt"; }
  std::string key_file() const { return folder_ + "/tls.key"; }

  void Show(const TestCertificate& certificate) {
    namespace fs = std::filesystem;
    const std::string version = absl::StrCat(folder_, ".", ++versions_);
    fs::create_directory(version);
    for (const auto& [from, to] : {std::pair(certificate.cert_file(), version + "/tls.crt"),
                                   std::pair(certificate.key_file(), version + "/tls.key")}) {
      fs::copy_file(from, to);
      // gRPC tells versions apart by the seconds of their times.
      fs::last_write_time(to, fs::file_time_type::clock::now() - std::chrono::hours(versions_));
    }
    fs::create_directory_symlink(version, folder_ + ".new");
    fs::rename(folder_ + ".new", folder_);
  }

 private:
  const std::string folder_;
  int versions_ = 0;
};

TEST(Renewal, OfACallersOwnCertificateUnderLoadFailsNoRequest) {
  AccessServer server;
  MountedCertificate mounted(server.Path("mounted"));
  mounted.Show(server.caller);
  client::ChannelOptions options = server.Options(server.Path("token"));
  options.tls->cert_file = mounted.cert_file();
  options.tls->key_file = mounted.key_file();
  const auto idle = client::PrefillClient::Create(options);  // connects at its first call
  ASSERT_TRUE(idle.ok()) << idle.status();
  Load load(server, options);
  load.AwaitCalls(40);
  mounted.Show(server.after);
  load.AwaitCalls(80);
  load.Stop();
  RecordProperty("calls", load.calls());
  for (const absl::Status& failure : load.failures()) ADD_FAILURE() << failure;

  // Now the server trusts the new certificate alone.
  server.Write("bundle.pem",
               ContentOf(server.before.cert_file()) + ContentOf(server.after.cert_file()));
  server.process().Signal(SIGHUP);
  EXPECT_TRUE(server.SoonAtLeast("prefilld_certificate_reloads_total{result=\"ok\"}", 1));
  EXPECT_EQ(server.CallWith(server.Options(server.Path("token"))).code(),
            absl::StatusCode::kUnavailable)
      << "the old certificate";
  EXPECT_EQ(server.CallWith(options), absl::OkStatus());
  // A channel looks at its files every two seconds.
  const absl::Time deadline = absl::Now() + kSoon;
  absl::Status late = AccessServer::Call(**idle);
  while (!late.ok() && absl::Now() < deadline) late = AccessServer::Call(**idle);
  EXPECT_EQ(late, absl::OkStatus()) << "a client that is older than the certificate";
}

// The file of tenants becomes a pipe. Whoever reads that waits until somebody writes, as for a file
// on a server that is away.
TEST(Renewal, AFileThatHangsKeepsNeitherCallsNorSignalsWaiting) {
  AccessServer server;
  ASSERT_EQ(mkfifo(server.Path("pipe").c_str(), 0600), 0);
  std::filesystem::rename(server.Path("pipe"), server.Path("tenants.json"));
  server.process().Signal(SIGHUP);
  int writer = -1;  // can be opened once the server reads
  for (const absl::Time until = absl::Now() + kSoon; writer < 0 && absl::Now() < until;) {
    writer = open(server.Path("tenants.json").c_str(), O_WRONLY | O_NONBLOCK | O_CLOEXEC);
    absl::SleepFor(absl::Milliseconds(5));
  }
  ASSERT_GE(writer, 0);
  server.process().Signal(SIGHUP);
  EXPECT_EQ(server.CallWith(server.Options(server.Path("token"))), absl::OkStatus());
  server.process().Signal(SIGTERM);
  EXPECT_EQ(server.process().Wait(kSoon), 0);
  EXPECT_THAT(server.process().stderr_text(), HasSubstr("\"files_hang\":\"yes\""));
  close(writer);
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
