#include "tests/model/device_flag.h"

#include <cstdio>
#include <cstring>

#include "gtest/gtest.h"

namespace prefilld::model {
namespace {

DeviceChoice device = DeviceChoice::kCpu;

bool ParseFlag(const char* flag) {
  if (std::strcmp(flag, "--device=cuda") == 0) {
    device = DeviceChoice::kCuda;
    return true;
  }
  return std::strcmp(flag, "--device=cpu") == 0 || std::strncmp(flag, "--gtest_", 8) == 0;
}

}  // namespace

DeviceChoice DeviceFlag() { return device; }

int RunTestsOnDevice(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    if (ParseFlag(argv[i])) continue;
    std::fprintf(stderr, "unknown flag %s; see the top of the test's source\n", argv[i]);
    return 2;
  }
  testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}

}  // namespace prefilld::model
