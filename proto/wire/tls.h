// TLS credentials from PEM files, for those who listen and for those who dial.
#ifndef PREFILLD_PROTO_WIRE_TLS_H_
#define PREFILLD_PROTO_WIRE_TLS_H_

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace grpc {
class ChannelCredentials;
}  // namespace grpc

namespace prefilld::wire {

// The certificates that a server shows to its callers and asks of them, as --tls_cert, --tls_key
// and --tls_client_ca name them.
struct ServerTls {
  std::string cert_file;  // empty: plain text
  std::string key_file;
  std::string client_ca_file;  // set: callers must present a certificate signed by it

  // "off", "on", or "mutual" when callers must present a certificate; for the log.
  const char* mode() const;
};

// The certificates that a client trusts and shows.
struct ChannelTls {
  std::string ca_file;    // empty: the system's certificates
  std::string cert_file;  // with key_file: what to show to a server that asks (mutual TLS)
  std::string key_file;
  std::string server_name;  // the name to verify, if it is not the address's host
};

// Reads the file's content; an empty path gives an empty string. INVALID_ARGUMENT names `field` and
// path when the file cannot be read or is empty.
absl::StatusOr<std::string> ReadPemFile(const char* field, const std::string& path);

// Returns a text that changes when the files are written or replaced, without reading them. Empty
// paths are no files.
std::string FileVersions(const std::vector<std::string>& paths);

// Adds what is wrong with the files, naming flag and path: one is given without another that it
// needs, one cannot be read, or they hold nothing that could be served now (certificates.h).
void CheckServerTls(const ServerTls& tls, std::vector<std::string>& problems);

// Reads the files and returns when the certificate that is shown expires; never, if none is.
// INVALID_ARGUMENT: as MakeChannelCredentials.
absl::StatusOr<absl::Time> ChannelCertificateExpiry(const ChannelTls& tls);

// Makes credentials for a channel: plain text for nullopt. Files that change are read again within
// seconds, for connections that are made from then on; while a new certificate and a new key do not
// match, none can be made. INVALID_ARGUMENT: a file cannot be read or holds nothing that is valid
// now (certificates.h), or only one of cert_file and key_file is given.
absl::StatusOr<std::shared_ptr<grpc::ChannelCredentials>> MakeChannelCredentials(
    const std::optional<ChannelTls>& tls);

}  // namespace prefilld::wire

#endif  // PREFILLD_PROTO_WIRE_TLS_H_
