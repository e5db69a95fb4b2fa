// A prefilld with mutual TLS and tokens, and the calls that tests make to it.
#ifndef PREFILLD_TESTS_INTEGRATION_ACCESS_SERVER_H_
#define PREFILLD_TESTS_INTEGRATION_ACCESS_SERVER_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "client/prefill_client.h"
#include "grpcpp/security/credentials.h"
#include "tests/integration/child_process.h"
#include "tests/model/random_checkpoint.h"
#include "tests/proto/test_certificate.h"

namespace prefilld::integration {

// SHA-256 of the tokens "sesame" and "barley".
inline constexpr char kSesameHash[] =
    "d0c04f4b1951e4aeaaec8223ed2039e542f3aae805a6fa7f6d794e5afff5d272";
inline constexpr char kBarleyHash[] =
    "d7a9ead0b15cd7c8f3ba0d573530ad05b70052080825dda30744c9c7f44e07dc";
inline constexpr absl::Duration kSoon = absl::Seconds(30);

std::string ContentOf(const std::string& path);

// The server takes requests of the tenant "ours" alone, whose token is "sesame" at first and whose
// certificate names localhost. All certificates are in one bundle, which both sides trust.
class AccessServer {
 public:
  AccessServer();
  ~AccessServer();

  ServerProcess& process() { return *process_; }
  const model::RandomCheckpoint& checkpoint() const { return checkpoint_; }

  std::string Path(const std::string& name) const { return folder_ + "/" + name; }
  // Puts the file in its place at once, as whoever renews secrets does.
  std::string Write(const std::string& name, const std::string& content) const;
  // Lets tokens with these hashes be of the tenant "ours".
  void WriteTenants(const std::vector<std::string>& hashes) const;

  // Returns what a caller with a certificate of ours needs; an empty token_file shows no token.
  client::ChannelOptions Options(const std::string& token_file) const;
  std::shared_ptr<grpc::ChannelCredentials> Showing(const TestCertificate& certificate) const;

  static absl::Status Call(client::PrefillClient& client);
  absl::Status CallWith(const client::ChannelOptions& options) const;
  absl::Status CallWithToken(const std::string& token) const;

  double Metric(const std::string& sample) const;
  bool SoonAtLeast(const std::string& sample, double value) const;

  const TestCertificate before, after, caller;
  const TestCertificate expired{-absl::Hours(48), -absl::Hours(24)};
  const TestCertificate own;  // the server's: that of `before`, until a test replaces it

 private:
  const model::RandomCheckpoint checkpoint_;
  std::string folder_;
  std::unique_ptr<ServerProcess> process_;
};

}  // namespace prefilld::integration

#endif  // PREFILLD_TESTS_INTEGRATION_ACCESS_SERVER_H_
