// The command line. Flags are read here and nowhere else; everything else takes structs.
#ifndef PREFILLD_SERVER_OPTIONS_H_
#define PREFILLD_SERVER_OPTIONS_H_

#include <vector>

#include "absl/status/statusor.h"
#include "server/server_options.h"

namespace prefilld::server {

// Reads the command line; an unknown flag ends the process with a message. INVALID_ARGUMENT lists
// every invalid value, not only the first.
absl::StatusOr<ServerOptions> OptionsFromCommandLine(int argc, char** argv);

// Makes the options from the flags as they are set now, which is the second half of the above.
// `positional` holds the program's name and the arguments that are no flags.
absl::StatusOr<ServerOptions> OptionsFromFlags(const std::vector<char*>& positional);

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_OPTIONS_H_
