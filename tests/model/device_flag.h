// The flag --device=cpu|cuda of tests that run on either device.
#ifndef PREFILLD_TESTS_MODEL_DEVICE_FLAG_H_
#define PREFILLD_TESTS_MODEL_DEVICE_FLAG_H_

#include "model/device/device.h"

namespace prefilld::model {

// The CPU unless the flag says otherwise.
DeviceChoice DeviceFlag();

// Reads the flag, runs all tests and returns the exit status: 2 for a flag that is neither this one
// nor one of GoogleTest's. The whole of a test's main.
int RunTestsOnDevice(int argc, char** argv);

}  // namespace prefilld::model

#endif  // PREFILLD_TESTS_MODEL_DEVICE_FLAG_H_
