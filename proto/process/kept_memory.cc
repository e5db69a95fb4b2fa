#include "proto/process/kept_memory.h"

#include <malloc.h>

namespace prefilld::process {

void KeepFreedMemory() {
#if defined(__GLIBC__)
  // glibc keeps a thread's heap, which has 64 MiB at most, if the one before it could not take in
  // so much more; from this size on that is never so.
  constexpr int kHeapBytes = 64 << 20;
  constexpr int kMappedBytes = 32 << 20;  // the most that glibc accepts
  mallopt(M_TRIM_THRESHOLD, kKeptBytes);
  mallopt(M_TOP_PAD, kHeapBytes);
  mallopt(M_MMAP_THRESHOLD, kMappedBytes);
#endif
}

}  // namespace prefilld::process
