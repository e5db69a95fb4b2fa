// The instruction sets that vector code is compiled for; the best one is chosen at run time.
//
// Include it before any header of Highway. It leaves out sets that gain nothing over their
// predecessor here, and sets of scalable vectors: those cannot be held in arrays, as the register
// tiles of the attention kernel are.
//
// Write vector code in functions of its own, not in the body of an OpenMP loop: clang compiles such
// a body without the instruction set of the function around it.
#ifndef PREFILLD_KERNELS_CPU_SIMD_TARGETS_H_
#define PREFILLD_KERNELS_CPU_SIMD_TARGETS_H_

#define HWY_DISABLED_TARGETS \
  (HWY_SSSE3 | HWY_AVX3_DL | HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128 | HWY_RVV)

#endif  // PREFILLD_KERNELS_CPU_SIMD_TARGETS_H_
