// The certificates of a server that serves on while they are renewed.
#ifndef PREFILLD_PROTO_WIRE_SERVER_CERTIFICATES_H_
#define PREFILLD_PROTO_WIRE_SERVER_CERTIFICATES_H_

#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "proto/wire/tls.h"

struct grpc_ssl_server_certificate_config;

namespace grpc {
class ServerCredentials;
}

namespace prefilld::wire {

// Reads the files of a ServerTls again when it is told to. A connection that is being made gets the
// certificates that were read last and found valid; those that are open keep theirs. Thread-safe.
class ServerCertificates {
 public:
  // INVALID_ARGUMENT: as CheckServerTls.
  static absl::StatusOr<std::unique_ptr<ServerCertificates>> Load(const ServerTls& files);
  ~ServerCertificates();

  // Returns credentials for one address of a server. They show what this holds; this must outlive
  // the server.
  std::shared_ptr<grpc::ServerCredentials> Credentials();

  // Reads the files, and returns whether they hold something else than before. INVALID_ARGUMENT:
  // they are not valid; then what was there before is shown on.
  absl::StatusOr<bool> Reload();

  // Returns a text that changes when the files are written or replaced, without reading them.
  std::string FileVersions() const;
  // Returns what FileVersions was just before Load read the files. Who compares with it misses no
  // change, however long after Load he begins to look.
  const std::string& loaded_versions() const { return loaded_versions_; }

  // Returns when the first certificate of the chain expires.
  absl::Time expiry() const;

 private:
  struct Content;
  struct Viewer;

  void Show(Viewer& viewer, grpc_ssl_server_certificate_config** config);

  explicit ServerCertificates(const ServerTls& files);

  const ServerTls files_;
  const std::string loaded_versions_;
  mutable absl::Mutex mu_;
  std::shared_ptr<const Content> content_ ABSL_GUARDED_BY(mu_);
  // One for each address. gRPC refers to them as long as the server lives.
  std::vector<std::unique_ptr<Viewer>> viewers_ ABSL_GUARDED_BY(mu_);
};

}  // namespace prefilld::wire

#endif  // PREFILLD_PROTO_WIRE_SERVER_CERTIFICATES_H_
