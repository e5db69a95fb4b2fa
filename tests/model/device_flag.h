// The flag --device=cpu|cuda of tests that run on either device.
#ifndef PREFILLD_TESTS_MODEL_DEVICE_FLAG_H_
#define PREFILLD_TESTS_MODEL_DEVICE_FLAG_H_

#include "model/device/device.h"

namespace prefilld::model {

// Returns the device that the flag names, the CPU by default.
DeviceChoice DeviceFlag();

// Reads the flag, runs all tests and returns the exit status, which is 2 for a flag that is neither
// this one nor one of GoogleTest's. A test's main needs to do nothing else.
int RunTestsOnDevice(int argc, char** argv);

}  // namespace prefilld::model

#endif  // PREFILLD_TESTS_MODEL_DEVICE_FLAG_H_
