// States what must hold for every input of a fuzz target.
#ifndef PREFILLD_TESTS_FUZZ_REQUIRE_H_
#define PREFILLD_TESTS_FUZZ_REQUIRE_H_

#include <cstdio>
#include <cstdlib>

namespace prefilld::fuzz {

// Ends the process when the promise is broken. libFuzzer then keeps the input as a finding.
inline void Require(bool holds, const char* promise) {
  if (holds) return;
  std::fprintf(stderr, "broken: %s\n", promise);
  std::abort();
}

}  // namespace prefilld::fuzz

#endif  // PREFILLD_TESTS_FUZZ_REQUIRE_H_
