// The file in which a serving process writes the ports that it was given for port 0:
//   grpc=50051
//   metrics=9464
//   kv_bench=50053
// The last line is there if it is served.
#ifndef PREFILLD_PROTO_WIRE_PORT_FILE_H_
#define PREFILLD_PROTO_WIRE_PORT_FILE_H_

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace prefilld::wire {

struct Ports {
  int grpc = 0;
  int metrics = 0;   // 0: no metrics endpoint
  int kv_bench = 0;  // 0: no bare TCP to measure
};

// Writes the file under another name and renames it, so that a reader sees all of it or nothing.
// Does nothing for an empty path. INVALID_ARGUMENT, with the flag's name, when the file cannot be
// written.
absl::Status WritePortFile(const std::string& path, const Ports& ports);

// Reads the file. UNAVAILABLE: it is not there yet. INVALID_ARGUMENT: it is not a port file.
absl::StatusOr<Ports> ReadPortFile(const std::string& path);

}  // namespace prefilld::wire

#endif  // PREFILLD_PROTO_WIRE_PORT_FILE_H_
