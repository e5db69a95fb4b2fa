// The command line of prefill-calibrate. Flags are read here and nowhere else.
#ifndef PREFILLD_MODEL_CALIBRATION_OPTIONS_H_
#define PREFILLD_MODEL_CALIBRATION_OPTIONS_H_

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "model/calibration/attention_recorder.h"
#include "model/device/device.h"

namespace prefilld::model {

struct CalibrateOptions {
  std::string checkpoint_dir;
  std::vector<std::string> overruled_config_keys;  // see LoadModelConfig
  std::string out_dir;
  std::vector<std::string> prompts;  // files and folders
  int bos = 256;
  DeviceChoice device = DeviceChoice::kAuto;
  int cpu_threads = 0;
  RecorderOptions recorder;  // max_tokens is left to the prompts
};

// Reads the command line. INVALID_ARGUMENT lists every problem.
absl::StatusOr<CalibrateOptions> OptionsFromCommandLine(int argc, char** argv);

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_CALIBRATION_OPTIONS_H_
