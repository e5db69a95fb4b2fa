// The OpenMP threads that ops run on; oneDNN runs on the same ones.
#ifndef PREFILLD_KERNELS_CPU_THREADS_H_
#define PREFILLD_KERNELS_CPU_THREADS_H_

#include <string_view>

namespace prefilld::kernels::cpu {

// The cores this process may use: those it may run on, or fewer when the container's CPU quota
// says so. More threads than the quota pays for would be stopped in the midst of an op.
int AvailableThreads();

// The whole cores, at least 1, of a quota as cgroup v2 writes it into cpu.max: microseconds of CPU
// time per period, then the period ("150000 100000"). 0: no quota, or not understood.
int CoresOfQuota(std::string_view cpu_max);

// From now on ops called by this thread run on `num_threads` threads, itself included. Cheap.
void UseThreads(int num_threads);

}  // namespace prefilld::kernels::cpu

#endif  // PREFILLD_KERNELS_CPU_THREADS_H_
