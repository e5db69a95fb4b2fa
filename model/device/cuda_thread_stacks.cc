// Enlarges thread stacks so that they hold the thread-local data of the CUDA libraries.
//
// Every thread's stack also holds the thread-local data of all libraries that a program is linked
// with; libcublasLt alone has 94 KB. The HTTP server inside prometheus-cpp asks for stacks of 100
// KB, with which no thread could be made, so the metrics endpoint would not start. Therefore
// programs with CUDA give every thread at least the size below, by a function that replaces libc's
// for all their libraries (model/CMakeLists.txt makes the linker use it).
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
