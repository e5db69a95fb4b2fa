// The ceiling for a KV stream between two processes is as many bytes over bare TCP between the same
// two, neither framed nor checked. A BenchPeer sends them, and tells what its process has used.
//
// A caller connects and sends an order of 16 bytes, two little-endian integers of 64 bits: how many
// bytes it wants, and in pieces of how many the peer is to write them. The peer sends them and
// closes the connection. For an order of 0 bytes it sends a ProcessUse instead, in the same form.
#ifndef PREFILLD_PROTO_WIRE_BENCH_PEER_H_
#define PREFILLD_PROTO_WIRE_BENCH_PEER_H_

#include <cstdint>
#include <list>
#include <memory>
#include <string>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "proto/wire/listening_sockets.h"

namespace prefilld::wire {

// The model fingerprint of a server that makes its KV up.
inline constexpr char kKvBenchFingerprint[] = "synthetic";

// Either end gives up once nothing has moved for so long.
inline constexpr absl::Duration kBenchPatience = absl::Seconds(10);

// The use that a process has made of the machine since its start.
struct ProcessUse {
  int64_t cpu_us = 0;       // all threads, user and system
  int64_t page_faults = 0;  // those that needed no disk
};
ProcessUse UseOfThisProcess();

// The end that sends. It has a thread that accepts, and one for each connection.
class BenchPeer {
 public:
  // `address` is host:port; port 0 is any free one. UNAVAILABLE: as ListenOn.
  static absl::StatusOr<std::unique_ptr<BenchPeer>> Listen(
      const std::string& address, absl::Duration patience = kBenchPatience);
  ~BenchPeer();  // breaks off what is under way

  int port() const { return listening_.port; }

 private:
  struct Connection {
    Descriptor socket;
    bool done = false;  // the peer's lock guards it
    std::thread thread;
  };

  BenchPeer(ListeningSockets listening, absl::Duration patience, Descriptor stop_reader,
            Descriptor stop_writer);
  void Accept();
  void Serve(int socket) const;
  void Start(Descriptor socket);

  const ListeningSockets listening_;
  const absl::Duration patience_;
  const Descriptor stop_reader_, stop_writer_;  // a pipe; its end wakes the accepting thread
  const std::unique_ptr<const uint8_t[]> source_;
  absl::Mutex mu_;
  std::list<Connection> connections_ ABSL_GUARDED_BY(mu_);
  std::thread accepting_;
};

// The end that receives. These fail with UNAVAILABLE when the peer cannot be reached or breaks off.
//
// Returns the seconds that `total_bytes` take over so many connections, each of which has a thread
// here and one there. What arrives is dropped.
absl::StatusOr<double> ReceiveOverTcp(const std::string& address, int64_t total_bytes,
                                      int num_connections, int64_t piece_bytes);
absl::StatusOr<ProcessUse> AskUse(const std::string& address,
                                  absl::Duration patience = kBenchPatience);

}  // namespace prefilld::wire

#endif  // PREFILLD_PROTO_WIRE_BENCH_PEER_H_
