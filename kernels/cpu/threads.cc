#include "kernels/cpu/threads.h"

#include <omp.h>

namespace prefilld::kernels::cpu {

int AvailableThreads() { return omp_get_num_procs(); }

void UseThreads(int num_threads) { omp_set_num_threads(num_threads); }

}  // namespace prefilld::kernels::cpu
