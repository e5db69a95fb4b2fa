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
#include "model/device/stopwatch.h"

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
  absl::StatusOr<std::unique_ptr<Device>> device =
      CreateDevice(options.device, options.cpu_threads);
  if (!device.ok()) return device.status();
  loaded.device = *std::move(device);
  absl::StatusOr<Weights> weights =
      LoadWeights(options.checkpoint_dir, loaded.config, *loaded.device);
  if (!weights.ok()) return weights.status();
  loaded.weights = *std::move(weights);
  return absl::OkStatus();
}

absl::Status RecordPrompt(const CalibrateOptions& options, const Loaded& loaded,
                          const CalibrationPrompt& prompt, AttentionRecorder& recorder) {
  const auto num_tokens = static_cast<int64_t>(prompt.tokens.size());
  auto metadata =
      CalibrationMetadata(loaded.config, loaded.weights.fingerprint, num_tokens, options.recorder);
  metadata["prompt"] = prompt.name;
  metadata["domain"] = prompt.domain;
  auto file = SafetensorsWriter::Create(
      options.out_dir + "/" + prompt.FileName(),
      RecordedTensors(loaded.config, num_tokens, options.recorder), metadata);
  if (!file.ok()) return file.status();

  Stopwatch stopwatch;
  const bool live = isatty(STDERR_FILENO);
  const auto progress = [&](int layer) {
    if (!live) return;
    std::fprintf(stderr, "\r%s: layer %d of %d", prompt.FileName().c_str(), layer + 1,
                 loaded.config.num_layers);
  };
  absl::Status status = recorder.Record(prompt.tokens, **file, progress);
  if (status.ok()) status = (*file)->Finish();
  if (!status.ok()) return status;
  std::fprintf(stderr, "%s%s: %lld tokens in %.1f s, %.1f MB\n", live ? "\r" : "",
               prompt.FileName().c_str(), static_cast<long long>(num_tokens),
               static_cast<double>(stopwatch.LapUs()) * 1e-6,
               static_cast<double>((*file)->file_bytes()) * 1e-6);
  return absl::OkStatus();
}

absl::Status Run(CalibrateOptions options) {
  absl::StatusOr<ModelConfig> config = LoadModelConfig(options.checkpoint_dir);
  if (!config.ok()) return config.status();
  absl::StatusOr<std::vector<CalibrationPrompt>> prompts = ReadCalibrationPrompts(
      options.prompts, options.bos, config->vocab_size, PositionLimit(*config));
  if (!prompts.ok()) return prompts.status();
  for (const CalibrationPrompt& prompt : *prompts) {
    options.recorder.max_tokens =
        std::max(options.recorder.max_tokens, static_cast<int64_t>(prompt.tokens.size()));
  }
  std::error_code error;
  std::filesystem::create_directories(options.out_dir, error);
  if (error) {
    return absl::UnavailableError(absl::StrCat("--out=", options.out_dir, ": ", error.message()));
  }

  Loaded loaded;
  if (absl::Status status = Load(options, *std::move(config), loaded); !status.ok()) return status;
  auto recorder = AttentionRecorder::Create(loaded.device.get(), &loaded.config, &loaded.weights,
                                            options.recorder);
  if (!recorder.ok()) return recorder.status();
  for (const CalibrationPrompt& prompt : *prompts) {
    absl::Status status = RecordPrompt(options, loaded, prompt, **recorder);
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

}  // namespace
}  // namespace prefilld::model

int main(int argc, char** argv) {
  using namespace prefilld::model;
  absl::StatusOr<CalibrateOptions> options = OptionsFromCommandLine(argc, argv);
  const absl::Status status = options.ok() ? Run(*std::move(options)) : options.status();
  if (status.ok()) return 0;
  std::fprintf(stderr, "prefill-calibrate: %s\n", std::string(status.message()).c_str());
  return options.ok() ? 1 : 2;
}
