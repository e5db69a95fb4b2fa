#include "proto/process/kept_memory.h"

#include <malloc.h>

namespace prefilld::process {

void KeepFreedMemory() {
#if defined(__GLIBC__)
  mallopt(M_TRIM_THRESHOLD, kKeptBytes);
  // A setting of either ends glibc's own adjustment of the other, which starts at 128 KiB. 32 MiB
  // is the most that it accepts.
  mallopt(M_MMAP_THRESHOLD, 32 << 20);
#endif
}

}  // namespace prefilld::process
