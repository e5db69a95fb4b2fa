// Stacks that hold the thread-local data of the CUDA libraries.
//
// Every thread's stack also holds the thread-local data of all libraries a program is linked with;
// libcublasLt alone has 94 KB of it. The HTTP server inside prometheus-cpp asks for stacks of 100
// KB, with which no thread can then be made, and the metrics endpoint would not start. So programs
// with CUDA give no thread less than this, through a function that takes the place of libc's for
// all their libraries (model/CMakeLists.txt makes the linker take it).
#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <cstddef>

extern "C" int pthread_attr_setstacksize(pthread_attr_t* attributes, size_t bytes) noexcept {
  constexpr size_t kLeastStackBytes = size_t{512} << 10;
  using Function = int(pthread_attr_t*, size_t);
  static Function* const libc_function =
      reinterpret_cast<Function*>(dlsym(RTLD_NEXT, "pthread_attr_setstacksize"));
  return libc_function(attributes, std::max(bytes, kLeastStackBytes));
}
