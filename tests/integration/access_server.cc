#include "tests/integration/access_server.h"

#include <stdlib.h>

#include <filesystem>
#include <fstream>
#include <sstream>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "tests/integration/metrics_page.h"

namespace prefilld::integration {
namespace {

class Discarding : public client::KvSink {
 public:
  absl::Status OnAccepted(const ::prefill::v1::Accepted&) override { return absl::OkStatus(); }
  absl::Status OnProgress(const ::prefill::v1::Progress&) override { return absl::OkStatus(); }
  absl::Status OnFrame(const wire::ReceivedFrame&) override { return absl::OkStatus(); }
};

}  // namespace

std::string ContentOf(const std::string& path) {
  std::stringstream content;
  content << std::ifstream(path).rdbuf();
  return content.str();
}

AccessServer::AccessServer() {
  folder_ = (std::filesystem::temp_directory_path() / "prefilld-access-XXXXXX").string();
  if (mkdtemp(folder_.data()) == nullptr) abort();
  own.ReplaceWith(before);
  std::string bundle;
  for (const TestCertificate* certificate : {&before, &after, &caller, &expired}) {
    bundle += ContentOf(certificate->cert_file());
  }
  Write("bundle.pem", bundle);
  WriteTenants({kSesameHash});
  Write("token", "sesame\n");
  process_ = std::make_unique<ServerProcess>(
      "prefilld",
      std::vector<std::string>{"--model=" + checkpoint_.dir(), "--device=cpu", "--cpu_threads=1",
                               "--tls_cert=" + own.cert_file(), "--tls_key=" + own.key_file(),
                               "--tls_client_ca=" + Path("bundle.pem"), "--tenant_from=token",
                               "--tenants=" + Path("tenants.json"), "--log_format=json"});
}

AccessServer::~AccessServer() {
  process_.reset();
  std::filesystem::remove_all(folder_);
}

std::string AccessServer::Write(const std::string& name, const std::string& content) const {
  std::ofstream(Path("new")) << content;
  std::filesystem::rename(Path("new"), Path(name));
  return Path(name);
}

// The token "other" is that of a tenant whose certificate has another name.
void AccessServer::WriteTenants(const std::vector<std::string>& hashes) const {
  Write("tenants.json", absl::StrCat(R"({"unknown": "refuse", "tenants": [
      {"name": "ours", "certificates": ["localhost"], "token_sha256": [")",
                                     absl::StrJoin(hashes, "\", \""), R"("]},
      {"name": "elsewhere", "certificates": ["elsewhere"], "token_sha256": [
       "d9298a10d1b0735837dc4bd85dac641b0f3cef27a47e5d53a54f2f3f5b2fcffa"]}]})"));
}

client::ChannelOptions AccessServer::Options(const std::string& token_file) const {
  return {.address = process_->address(),
          .tls = wire::ChannelTls{.ca_file = Path("bundle.pem"),
                                  .cert_file = caller.cert_file(),
                                  .key_file = caller.key_file(),
                                  .server_name = ""},
          .token_file = token_file};
}

std::shared_ptr<grpc::ChannelCredentials> AccessServer::Showing(
    const TestCertificate& certificate) const {
  return grpc::SslCredentials({.pem_root_certs = ContentOf(Path("bundle.pem")),
                               .pem_private_key = ContentOf(certificate.key_file()),
                               .pem_cert_chain = ContentOf(certificate.cert_file())});
}

absl::Status AccessServer::Call(client::PrefillClient& client) {
  ::prefill::v1::PrefillRequest request;
  for (uint32_t id = 1; id <= 20; ++id) request.add_token_ids(id);
  Discarding sink;
  return client.Prefill(request, sink, {.deadline = absl::Now() + kSoon}).status();
}

absl::Status AccessServer::CallWith(const client::ChannelOptions& options) const {
  const auto client = client::PrefillClient::Create(options);
  return client.ok() ? Call(**client) : client.status();
}

absl::Status AccessServer::CallWithToken(const std::string& token) const {
  return CallWith(Options(token.empty() ? "" : Write("other_token", token)));
}

double AccessServer::Metric(const std::string& sample) const {
  return MetricsPage(process_->metrics_address()).Value(sample);
}

bool AccessServer::SoonAtLeast(const std::string& sample, double value) const {
  return WaitForMetrics(process_->metrics_address(), kSoon,
                        [&](const MetricsPage& page) { return page.Value(sample) >= value; });
}

}  // namespace prefilld::integration
