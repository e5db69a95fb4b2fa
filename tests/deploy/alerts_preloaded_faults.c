// Gives faults to a prefilld that preloads this library. It stands before oneDNN's matrix product and
// before accept4, and asks files in the folder PREFILLD_TEST_FAULTS:
//
//   stands_still   no product ends while this is there
//   fails          products fail for want of memory
//   slow_ms        each product takes so many milliseconds longer
//   deaf_port      this port accepts nothing, as if no descriptor were left
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <errno.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

#include <oneapi/dnnl/dnnl.h>

typedef dnnl_status_t (*Sgemm)(char, char, dnnl_dim_t, dnnl_dim_t, dnnl_dim_t, float, const float*,
                               dnnl_dim_t, const float*, dnnl_dim_t, float, float*, dnnl_dim_t);

// Returns the file's path in a buffer of the caller's thread.
static const char* fault(const char* name) {
  static __thread char path[4096];
  snprintf(path, sizeof path, "%s/%s", getenv("PREFILLD_TEST_FAULTS"), name);
  return path;
}

// Returns the number in the file, 0 if it is not there.
static int number(const char* name) {
  FILE* file = fopen(fault(name), "r");
  int value = 0;
  if (file == NULL) return 0;
  if (fscanf(file, "%d", &value) != 1) value = 0;
  fclose(file);
  return value;
}

dnnl_status_t dnnl_sgemm(char transa, char transb, dnnl_dim_t M, dnnl_dim_t N, dnnl_dim_t K,
                         float alpha, const float* A, dnnl_dim_t lda, const float* B,
                         dnnl_dim_t ldb, float beta, float* C, dnnl_dim_t ldc) {
  while (access(fault("stands_still"), F_OK) == 0) usleep(10000);
  if (access(fault("fails"), F_OK) == 0) return dnnl_out_of_memory;
  usleep(1000 * number("slow_ms"));
  const Sgemm product = (Sgemm)dlsym(RTLD_NEXT, "dnnl_sgemm");
  return product(transa, transb, M, N, K, alpha, A, lda, B, ldb, beta, C, ldc);
}

typedef int (*Accept4)(int, struct sockaddr*, socklen_t*, int);

int accept4(int listener, struct sockaddr* address, socklen_t* length, int flags) {
  struct sockaddr_in own = {0};
  socklen_t own_length = sizeof own;
  const int deaf_port = number("deaf_port");
  if (deaf_port != 0 && getsockname(listener, (struct sockaddr*)&own, &own_length) == 0 &&
      ntohs(own.sin_port) == deaf_port) {
    errno = EMFILE;
    return -1;
  }
  return ((Accept4)dlsym(RTLD_NEXT, "accept4"))(listener, address, length, flags);
}
