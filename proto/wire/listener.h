// A gRPC server on its port, with health checks and reflection.
#ifndef PREFILLD_PROTO_WIRE_LISTENER_H_
#define PREFILLD_PROTO_WIRE_LISTENER_H_

#include <cstdint>
#include <memory>
#include <string>

#include <grpcpp/server.h>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "proto/wire/arrivals.h"
#include "proto/wire/connections.h"
#include "proto/wire/server_certificates.h"
#include "proto/wire/tls.h"

namespace prefilld::wire {

struct ListenOptions {
  // host:port (port 0: any free one) and unix:/path, several of them separated by commas.
  std::string address;
  ServerTls tls;
  int64_t max_request_bytes = 0;   // a larger message is refused
  int64_t max_streams = 0;         // open calls per connection; more wait in the client
  int64_t max_connections = 1024;  // lowered to what the limit of open files allows
  // gRPC's buffers for what all connections send, and the state of connections and calls. Beyond
  // that calls are ended with RESOURCE_EXHAUSTED until it is enough, which fast senders outrun for
  // a while. 0: sixteen requests of the greatest size, at least 256 MiB.
  int64_t receive_memory_bytes = 0;
  // Services take streams of large messages: what may be on its way before it is read grows with
  // the speed of the connection. Otherwise it is 64 KiB of every call.
  bool streams_arrive = false;
  // A peer may leave its socket unread for so long before a call ends, and its other calls go on.
  // The connection as a whole is given up after twice that time, and half a minute more.
  absl::Duration stall_timeout = absl::Seconds(30);
  // Ends requests that take too long to arrive, of the services that it watches, of health and of
  // reflection, and bounds how many are read at once. It must outlive the listener. Null: they may
  // take as long as they like.
  Arrivals* arrivals = nullptr;
};

// A gRPC server and its addresses.
class Listener {
 public:
  // Serves `services`, which must outlive the listener. No second process can share a port or
  // take over a socket that is served.
  //
  // - A peer whose machine vanished without a word is noticed within half a minute.
  // - A process that runs out of file descriptors serves again as soon as it has some.
  // - Connections above the limit are refused, see Connections.
  // - A connection that has not become HTTP/2 within 20 s, or that carries no call for 5 minutes,
  //   is closed. gRPC's clients connect again when they need to.
  //
  // INVALID_ARGUMENT: a TLS file is not valid (CheckServerTls). UNAVAILABLE: the address cannot be
  // served. Both name the flag.
  static absl::StatusOr<std::unique_ptr<Listener>> Create(
      const ListenOptions& options, absl::Span<grpc::Service* const> services);
  // Shuts down at once, unless Shutdown was called.
  ~Listener();

  grpc::Server& server() { return *server_; }
  const Connections& connections() const { return *connections_; }
  // Returns null for plain text.
  ServerCertificates* certificates() { return certificates_.get(); }
  // Returns the port that was bound first; 0: Unix sockets alone.
  int port() const { return connections_->port(); }

  // Accepts no more, gives the calls that are open so long to end, breaks the others off, and waits
  // until all of them are over.
  void Shutdown(absl::Duration grace);

 private:
  explicit Listener(std::unique_ptr<Connections> connections);

  const std::unique_ptr<Connections> connections_;
  std::unique_ptr<ServerCertificates> certificates_;
  std::unique_ptr<grpc::Server> server_;
};

}  // namespace prefilld::wire

#endif  // PREFILLD_PROTO_WIRE_LISTENER_H_
