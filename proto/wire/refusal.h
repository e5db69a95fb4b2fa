// The least of HTTP/2 that tells a gRPC client why its connection is refused.
#ifndef PREFILLD_PROTO_WIRE_REFUSAL_H_
#define PREFILLD_PROTO_WIRE_REFUSAL_H_

#include <cstddef>
#include <string>
#include <utility>

#include "absl/strings/string_view.h"

namespace prefilld::wire {

// The server's side of one connection that is refused. The first call of the client ends with
// RESOURCE_EXHAUSTED and the reason. gRPC's clients would take a bare end of the connection for a
// fault of the network, and connect again and again.
class Refusal {
 public:
  // `reason` is printable ASCII without '%', at most 100 characters.
  explicit Refusal(std::string reason) : reason_(std::move(reason)) {}

  // Returns what to send at once: SETTINGS, without which a client does not begin a call.
  static std::string Greeting();
  // Takes bytes of the client. Returns what to send and to end the connection with, as soon as the
  // client has begun a call; empty until then. It never holds more than kMaxBytes.
  std::string Take(absl::string_view bytes);
  // Returns what to end the connection with when the client begins no call.
  std::string Goaway() const;

  static constexpr size_t kMaxBytes = 16384;

 private:
  const std::string reason_;
  std::string received_;  // from the next frame on, once the preface has passed
  bool preface_passed_ = false;
};

}  // namespace prefilld::wire

#endif  // PREFILLD_PROTO_WIRE_REFUSAL_H_
