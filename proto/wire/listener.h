// A gRPC server on its port, with health checks and reflection.
#ifndef PREFILLD_PROTO_WIRE_LISTENER_H_
#define PREFILLD_PROTO_WIRE_LISTENER_H_

#include <cstdint>
#include <memory>
#include <string>

#include <grpcpp/server.h>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "proto/wire/tls.h"

namespace prefilld::wire {

struct ListenOptions {
  std::string address;  // host:port; port 0: any free one
  ServerTls tls;
  int64_t max_request_bytes = 0;  // a larger message is refused before it is parsed
  int64_t max_streams = 0;        // open calls per connection; more wait in the client
};

struct Listener {
  std::unique_ptr<grpc::Server> server;
  int port = 0;  // the one that was bound
};

// Serves `services`, which must outlive the server. No second process can share the port. A caller
// that vanished without a word is noticed within half a minute.
//
// INVALID_ARGUMENT: a TLS file cannot be read. UNAVAILABLE: the address cannot be served. Both name
// the flag.
absl::StatusOr<Listener> Listen(const ListenOptions& options,
                                absl::Span<grpc::Service* const> services);

}  // namespace prefilld::wire

#endif  // PREFILLD_PROTO_WIRE_LISTENER_H_
