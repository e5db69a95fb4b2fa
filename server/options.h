// The command line. Flags are read here and nowhere else; everything else takes structs.
#ifndef PREFILLD_SERVER_OPTIONS_H_
#define PREFILLD_SERVER_OPTIONS_H_

#include "absl/status/statusor.h"
#include "server/server_options.h"

namespace prefilld::server {

// Reads the command line; an unknown flag ends the process with a message. INVALID_ARGUMENT lists
// every invalid value, not only the first.
absl::StatusOr<ServerOptions> OptionsFromCommandLine(int argc, char** argv);

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_OPTIONS_H_
