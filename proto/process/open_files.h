// The number of files, connections included, that the process may have open.
#ifndef PREFILLD_PROTO_PROCESS_OPEN_FILES_H_
#define PREFILLD_PROTO_PROCESS_OPEN_FILES_H_

namespace prefilld::process {

// Raises the soft limit to the hard one. The soft limit is often 1024, for the sake of programs
// that use select(); none of ours does.
void RaiseOpenFilesLimit();

}  // namespace prefilld::process

#endif  // PREFILLD_PROTO_PROCESS_OPEN_FILES_H_
