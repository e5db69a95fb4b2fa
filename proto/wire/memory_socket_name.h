// The names of the sockets at which a server takes in the memory of its consumers
// (prefill/v1/shared_memory.proto).
#ifndef PREFILLD_PROTO_WIRE_MEMORY_SOCKET_NAME_H_
#define PREFILLD_PROTO_WIRE_MEMORY_SOCKET_NAME_H_

#include <string>

#include "absl/strings/string_view.h"

namespace prefilld::wire {

// Returns prefilld- and 16 hexadecimal digits from the operating system's random source.
std::string NewMemorySocketName();
// Returns the name that such a socket has in a folder.
std::string MemorySocketFile(absl::string_view name);
bool IsMemorySocketFile(absl::string_view file_name);

// Tells whether an address is unix-abstract:NAME or unix:/FOLDER/FILE with such a name. A server
// could have its consumers connect to other programs' sockets otherwise.
bool IsMemorySocketAddress(const std::string& address);

}  // namespace prefilld::wire

#endif  // PREFILLD_PROTO_WIRE_MEMORY_SOCKET_NAME_H_
