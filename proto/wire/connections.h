// The connections of a listening port: they are accepted here, not by gRPC, and each is watched for
// as long as it is open.
//
// gRPC's own listener stops accepting for good once the process has run out of file descriptors, it
// takes any number of connections, and it ties the time that a peer may leave its socket unread to
// the time-out of pings. None of this holds for connections that are handed to it.
#ifndef PREFILLD_PROTO_WIRE_CONNECTIONS_H_
#define PREFILLD_PROTO_WIRE_CONNECTIONS_H_

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include <grpcpp/server_builder.h>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "proto/wire/listening_sockets.h"
#include "proto/wire/refusal.h"

namespace prefilld::wire {

// An open connection, seen through a second descriptor of its socket; or all connections of Unix
// sockets together, because gRPC does not tell their calls apart. Thread-safe.
class Connection {
 public:
  Connection(Descriptor fd, std::string peer) : fd_(std::move(fd)), peer_(std::move(peer)) {}

  // Returns how many bytes the peer's machine has acknowledged since the connection was opened. It
  // grows while the peer reads its socket, however slowly, and stands still when it does not.
  // Nobody acknowledges what is read from a Unix socket. There it is by how much the bytes that
  // wait in the sockets were seen to change, once a second.
  int64_t BytesTaken() const;
  // The caller's address, as grpc::ServerContext::peer() writes it. Empty for a Unix socket.
  const std::string& peer() const { return peer_; }

 private:
  friend class Connections;

  const Descriptor fd_;
  const std::string peer_;
  std::atomic<int64_t> moved_ = 0;  // through Unix sockets
  mutable std::atomic<bool> had_call_ = false;
  // Only the accepting thread uses these.
  int64_t last_taken_ = 0;
  absl::Time last_moved_ = absl::InfinitePast();
};

// Owns the listening sockets, a thread that accepts, and the list of open connections. Thread-safe.
class Connections {
 public:
  struct Limits {
    // More connections than that are refused.
    int64_t max_connections = 1024;
    // Whether the first call of a refused connection ends with RESOURCE_EXHAUSTED and the reason.
    // That needs plain text; otherwise the connection is closed.
    bool says_why = true;
    // A peer whose machine answers nothing for so long, though bytes are sent to it again and
    // again, is gone.
    absl::Duration silence = absl::Seconds(25);
    // A connection with bytes to send whose socket takes none of them for so long is closed.
    absl::Duration stuck = absl::Seconds(90);
  };
  struct Counts {
    int64_t open = 0;
    int64_t limit = 0;
    int64_t accepted = 0;       // so far, as are the others below
    int64_t refused = 0;        // above the limit
    int64_t accept_errors = 0;  // the process had no descriptor or memory for another one
    int64_t gone = 0;           // closed because of Limits::silence or Limits::stuck
    // Ended without a call, though the peer had sent something: a handshake that failed (an expired
    // or a foreign certificate, plain text where TLS is spoken) or another protocol.
    int64_t fruitless = 0;
  };

  // Binds `address` as ListenOn does. The limit of connections is lowered to what the process's
  // descriptors allow: each connection takes two, and kReservedDescriptors are left to everything
  // else.
  //
  // UNAVAILABLE: the address cannot be bound, or the descriptors are not enough for
  // kLeastConnections.
  static absl::StatusOr<std::unique_ptr<Connections>> Bind(const std::string& address,
                                                           const Limits& limits);
  static constexpr int64_t kReservedDescriptors = 64;
  static constexpr int64_t kLeastConnections = 8;

  // Accepts no more. Connections that are open stay open.
  ~Connections();

  // Starts to accept, and hands connections to `acceptor`, whose server must run. `every_second` is
  // called on the accepting thread; it may be null.
  void Start(std::unique_ptr<grpc::experimental::ExternalConnectionAcceptor> acceptor,
             std::function<void(absl::Time)> every_second = nullptr);
  // Stops accepting. It must be called before the server is shut down.
  void Stop();

  int port() const { return sockets_.port; }
  // The addresses by which this process reaches its sockets itself, see ListeningSockets.
  const std::vector<std::string>& own_addresses() const { return sockets_.own_addresses; }
  Counts counts() const;
  // Notes that a call came over the connection of this peer, as Find names it.
  void NoteCall(absl::string_view peer) const;
  // Finds an open connection by what grpc::ServerContext::peer() returns. For any call of a Unix
  // socket it is all of them. Null: there is none.
  std::shared_ptr<const Connection> Find(absl::string_view peer) const;

 private:
  Connections(const Limits& limits, ListeningSockets sockets);

  // A connection that is being refused. Once it has been told, it is read to its end, because
  // closing a socket with unread bytes would take the reason away from the peer.
  struct Refused {
    Descriptor fd;
    absl::Time until;
    Refusal refusal;
    bool told = false;
  };

  void Run();
  void AcceptAll(int listener, absl::Time now);
  void Admit(Descriptor fd, int listener, absl::Time now);
  void Refuse(Descriptor fd, absl::Time now);
  bool ReadRefused(Refused& refused);
  void OnEvent(int fd, absl::Time now);
  void Sweep(absl::Time now);
  bool IsGone(Connection& connection, absl::Time now) const;
  void WatchListeners(bool watch);
  int64_t num_open() const;

  const Limits limits_;
  const ListeningSockets sockets_;
  const std::shared_ptr<Connection> unix_callers_ = std::make_shared<Connection>(Descriptor(), "");
  const Descriptor epoll_;
  const Descriptor stop_event_;
  std::unique_ptr<grpc::experimental::ExternalConnectionAcceptor> acceptor_;
  std::function<void(absl::Time)> every_second_;

  // Only the accepting thread uses these.
  absl::flat_hash_map<int, Refused> refused_;
  absl::Time paused_until_ = absl::InfinitePast();  // accepting, after an error

  std::atomic<int64_t> num_accepted_ = 0, num_refused_ = 0, accept_errors_ = 0, num_gone_ = 0,
                       num_fruitless_ = 0;

  mutable absl::Mutex mu_;
  absl::flat_hash_map<int, std::shared_ptr<Connection>> open_ ABSL_GUARDED_BY(mu_);  // by fd
  absl::flat_hash_map<std::string, std::shared_ptr<Connection>> by_peer_ ABSL_GUARDED_BY(mu_);

  std::thread thread_;
};

}  // namespace prefilld::wire

#endif  // PREFILLD_PROTO_WIRE_CONNECTIONS_H_
