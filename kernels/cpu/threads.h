// The OpenMP threads that ops run on; oneDNN runs on the same ones.
#ifndef PREFILLD_KERNELS_CPU_THREADS_H_
#define PREFILLD_KERNELS_CPU_THREADS_H_

namespace prefilld::kernels::cpu {

// The cores this process may run on.
int AvailableThreads();

// From now on ops called by this thread run on `num_threads` threads, itself included. Cheap.
void UseThreads(int num_threads);

}  // namespace prefilld::kernels::cpu

#endif  // PREFILLD_KERNELS_CPU_THREADS_H_
