// How the allocator treats memory that is free again, in programs that move KV.
#ifndef PREFILLD_PROTO_PROCESS_KEPT_MEMORY_H_
#define PREFILLD_PROTO_PROCESS_KEPT_MEMORY_H_

namespace prefilld::process {

// Has glibc keep freed memory for the next allocation instead of giving it back to the system. gRPC
// receives KV in pieces of 64 KiB that live until their frame is verified and stored. By default
// glibc returns what is free at the top of a heap as soon as it is 128 KiB, so that many a piece
// begins with page faults: the kernel clears 4 KiB each time before the payload overwrites it.
//
// The process stays as large as it once was, by up to kKeptBytes for each of glibc's heaps.
// Allocations of 32 MiB and more, such as a pool of KV, are mapped and returned as before. Must be
// called before there are threads. It does nothing where another allocator or C library is used.
void KeepFreedMemory();

inline constexpr int kKeptBytes = 256 << 20;

}  // namespace prefilld::process

#endif  // PREFILLD_PROTO_PROCESS_KEPT_MEMORY_H_
