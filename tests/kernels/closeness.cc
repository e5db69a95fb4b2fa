#include "tests/kernels/closeness.h"

#include <algorithm>
#include <cmath>

namespace prefilld::kernels::testing {

Closeness Compare(const float* actual, const float* expected, size_t n) {
  Closeness c;
  double difference = 0.0, product = 0.0, actual_square = 0.0, expected_square = 0.0;
  for (size_t i = 0; i < n; ++i) {
    const double a = actual[i], e = expected[i];
    if (!std::isfinite(a) || !std::isfinite(e)) {
      const bool same = std::isnan(a) ? std::isnan(e) : a == e;
      c.wrong_non_finite += same ? 0 : 1;
      continue;
    }
    c.max_absolute = std::max(c.max_absolute, std::fabs(a - e));
    difference += (a - e) * (a - e);
    product += a * e;
    actual_square += a * a;
    expected_square += e * e;
  }
  if (expected_square > 0.0) c.relative = std::sqrt(difference / expected_square);
  if (actual_square > 0.0 && expected_square > 0.0) {
    c.cosine = product / std::sqrt(actual_square * expected_square);
  }
  return c;
}

std::ostream& operator<<(std::ostream& out, const Closeness& c) {
  return out << c.wrong_non_finite << " wrong non-finite elements, absolute " << c.max_absolute
             << ", relative " << c.relative << ", cosine " << c.cosine;
}

}  // namespace prefilld::kernels::testing
