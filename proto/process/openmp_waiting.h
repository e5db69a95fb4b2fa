// How the threads of OpenMP wait for each other, in programs that compute on the CPU.
#ifndef PREFILLD_PROTO_PROCESS_OPENMP_WAITING_H_
#define PREFILLD_PROTO_PROCESS_OPENMP_WAITING_H_

#include "absl/status/status.h"

namespace prefilld::process {

// Lets OpenMP threads that wait for others go to sleep soon. By default they spin for milliseconds,
// and where other processes want the cores too, a thread that spins takes the very time that the
// thread it waits for needs.
//
// OpenMP libraries read how to wait from the environment, and some of them before main. So this
// function sets OMP_WAIT_POLICY and GOMP_SPINCOUNT and executes the program anew, in the same
// process and with the same arguments. It must be the first call of main, before there are threads
// or open files.
//
// It returns if there is nothing to do, because it has been done or because somebody has set
// OMP_WAIT_POLICY, GOMP_SPINCOUNT or KMP_BLOCKTIME. It returns an error if the program could not be
// executed; it then goes on with threads that spin.
absl::Status LetOpenMpThreadsSleep(char** argv);

}  // namespace prefilld::process

#endif  // PREFILLD_PROTO_PROCESS_OPENMP_WAITING_H_
