// The OpenMP threads that ops run on; oneDNN runs on the same ones.
#ifndef PREFILLD_KERNELS_CPU_THREADS_H_
#define PREFILLD_KERNELS_CPU_THREADS_H_

#include <string_view>

namespace prefilld::kernels::cpu {

// Returns the number of cores this process may use: those it may run on, or fewer where the
// container's CPU quota says so. More threads than the quota pays for would be stopped in the
// middle of an op.
int AvailableThreads();

// Returns the whole cores, at least 1, of a quota as cgroup v2 writes it into cpu.max: microseconds
// of CPU time per period, then the period ("150000 100000"). 0 means that there is no quota, or
// that it was not understood.
int CoresOfQuota(std::string_view cpu_max);

// From now on, ops that this thread calls run on `num_threads` threads, itself included. The call
// is cheap.
void UseThreads(int num_threads);

}  // namespace prefilld::kernels::cpu

#endif  // PREFILLD_KERNELS_CPU_THREADS_H_
