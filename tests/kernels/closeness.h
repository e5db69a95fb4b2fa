// The distance of a tensor from its reference.
#ifndef PREFILLD_TESTS_KERNELS_CLOSENESS_H_
#define PREFILLD_TESTS_KERNELS_CLOSENESS_H_

#include <cstddef>
#include <ostream>

namespace prefilld::kernels::testing {

struct Closeness {
  // Number of elements where only one of the two is NaN or infinite, or both in different ways. The
  // figures below leave non-finite elements out.
  size_t wrong_non_finite = 0;
  double max_absolute = 0.0;
  double relative = 0.0;  // norm of the difference over norm of the reference
  double cosine = 1.0;
};

Closeness Compare(const float* actual, const float* expected, size_t n);

std::ostream& operator<<(std::ostream& out, const Closeness& c);

}  // namespace prefilld::kernels::testing

#endif  // PREFILLD_TESTS_KERNELS_CLOSENESS_H_
