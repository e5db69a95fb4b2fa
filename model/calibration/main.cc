// prefill-calibrate records what a model's heads attend to, prompt by prompt.
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <system_error>

#include "absl/strings/str_cat.h"
#include "model/calibration/attention_recorder.h"
#include "model/calibration/calibration_prompt.h"
#include "model/calibration/options.h"
#include "model/calibration/safetensors_writer.h"
#include "model/checkpoint/ignored.h"
#include "model/device/stopwatch.h"
#include "proto/process/openmp_waiting.h"
#include "proto/status_macros.h"

namespace prefilld::model {
namespace {

// A device with a model, ready to run.
struct Loaded {
  ModelConfig config;
  std::unique_ptr<Device> device;
  Weights weights;
};

absl::Status Load(const CalibrateOptions& options, ModelConfig config, Loaded& loaded) {
  loaded.config = std::move(config);
  PREFILLD_ASSIGN_OR_RETURN(loaded.device, CreateDevice(options.device, options.cpu_threads));
  PREFILLD_ASSIGN_OR_RETURN(loaded.weights,
                            LoadWeights(options.checkpoint_dir, loaded.config, *loaded.device));
  for (const auto& [what, names] : DescribeIgnored(loaded.config, loaded.weights.unused_tensors)) {
    std::fprintf(stderr, "ignored %s of the checkpoint: %s\n", what.c_str(), names.c_str());
  }
  return absl::OkStatus();
}

absl::Status RecordPrompt(const CalibrateOptions& options, const Loaded& loaded,
                          const CalibrationPrompt& prompt, AttentionRecorder& recorder) {
  const auto num_tokens = static_cast<int64_t>(prompt.tokens.size());
  auto metadata =
      CalibrationMetadata(loaded.config, loaded.weights.fingerprint, num_tokens, options.recorder);
  metadata["prompt"] = prompt.name;
  metadata["domain"] = prompt.domain;
  PREFILLD_ASSIGN_OR_RETURN(
      const auto file, SafetensorsWriter::Create(
                           options.out_dir + "/" + prompt.FileName(),
                           RecordedTensors(loaded.config, num_tokens, options.recorder), metadata));

  Stopwatch stopwatch;
  const bool live = isatty(STDERR_FILENO);
  const auto progress = [&](int layer) {
    if (!live) return;
    std::fprintf(stderr, "\r%s: layer %d of %d", prompt.FileName().c_str(), layer + 1,
                 loaded.config.num_layers);
  };
  PREFILLD_RETURN_IF_ERROR(recorder.Record(prompt.tokens, *file, progress));
  PREFILLD_RETURN_IF_ERROR(file->Finish());
  std::fprintf(stderr, "%s%s: %lld tokens in %.1f s, %.1f MB\n", live ? "\r" : "",
               prompt.FileName().c_str(), static_cast<long long>(num_tokens),
               static_cast<double>(stopwatch.LapUs()) * 1e-6,
               static_cast<double>(file->file_bytes()) * 1e-6);
  return absl::OkStatus();
}

absl::Status Run(CalibrateOptions options) {
  PREFILLD_ASSIGN_OR_RETURN(ModelConfig config,
                            LoadModelConfig(options.checkpoint_dir, options.overruled_config_keys));
  PREFILLD_ASSIGN_OR_RETURN(const std::vector<CalibrationPrompt> prompts,
                            ReadCalibrationPrompts(options.prompts, options.bos, config));
  for (const CalibrationPrompt& prompt : prompts) {
    options.recorder.max_tokens =
        std::max(options.recorder.max_tokens, static_cast<int64_t>(prompt.tokens.size()));
  }
  std::error_code error;
  std::filesystem::create_directories(options.out_dir, error);
  if (error) {
    return absl::UnavailableError(absl::StrCat("--out=", options.out_dir, ": ", error.message()));
  }

  Loaded loaded;
  PREFILLD_RETURN_IF_ERROR(Load(options, std::move(config), loaded));
  PREFILLD_ASSIGN_OR_RETURN(const auto recorder,
                            AttentionRecorder::Create(loaded.device.get(), &loaded.config,
                                                      &loaded.weights, options.recorder));
  for (const CalibrationPrompt& prompt : prompts) {
    PREFILLD_RETURN_IF_ERROR(RecordPrompt(options, loaded, prompt, *recorder));
  }
  return absl::OkStatus();
}

}  // namespace
}  // namespace prefilld::model

int main(int argc, char** argv) {
  using namespace prefilld::model;
  prefilld::process::LetOpenMpThreadsSleep(argv).IgnoreError();
  absl::StatusOr<CalibrateOptions> options = OptionsFromCommandLine(argc, argv);
  const absl::Status status = options.ok() ? Run(*std::move(options)) : options.status();
  if (status.ok()) return 0;
  std::fprintf(stderr, "prefill-calibrate: %s\n", std::string(status.message()).c_str());
  return options.ok() ? 1 : 2;
}
