#include "kernels/cpu/threads.h"

#include <omp.h>

#include <algorithm>
#include <fstream>
#include <sstream>
#include <string>

namespace prefilld::kernels::cpu {

int AvailableThreads() {
  const int cores = omp_get_num_procs();
  std::string cpu_max;
  std::getline(std::ifstream("/sys/fs/cgroup/cpu.max"), cpu_max);
  const int quota = CoresOfQuota(cpu_max);
  return quota > 0 ? std::min(cores, quota) : cores;
}

int CoresOfQuota(std::string_view cpu_max) {
  std::istringstream fields{std::string(cpu_max)};
  double quota = 0.0, period = 0.0;
  if (!(fields >> quota >> period) || quota <= 0.0 || period <= 0.0) return 0;
  return static_cast<int>(std::clamp(quota / period, 1.0, 4096.0));
}

void UseThreads(int num_threads) { omp_set_num_threads(num_threads); }

}  // namespace prefilld::kernels::cpu
