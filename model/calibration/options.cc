#include "model/calibration/options.h"

#include "absl/flags/flag.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "proto/process/command_line.h"

ABSL_FLAG(std::string, model, "", "Checkpoint folder. Required.");
ABSL_FLAG(std::vector<std::string>, ignore_config, {},
          "Fields of config.json to treat as absent, comma-separated; those of a nested object as "
          "rope_scaling.finetuned. For a field that is refused but changes nothing in this model.");
ABSL_FLAG(std::string, out, "", "Folder for the dumps, one file a prompt. Required.");
ABSL_FLAG(std::string, device, "auto", "auto, cpu or cuda.");
ABSL_FLAG(int32_t, cpu_threads, 0, "Compute threads of the CPU device. 0: all cores.");
ABSL_FLAG(
    int32_t, bos, 256,
    "Token to put before the bytes of a .txt prompt; 256 suits the embedded model. -1: none.");
ABSL_FLAG(int32_t, block_tokens, 128, "Tokens per block of the maps: 64 or 128, the server's.");
ABSL_FLAG(int64_t, grid, 0,
          "Join blocks until a map has at most so many cells a side. 0: keep every block. For "
          "prompts so long that the maps would not fit on the disk.");
ABSL_FLAG(float, gamma, 0.9f, "Mass of the vertical-slash sets that are measured, (0, 1].");
ABSL_FLAG(int64_t, min_budget_tokens, 128,
          "Least number of columns, and of diagonals, that vertical-slash keeps.");

namespace prefilld::model {
namespace {

constexpr char kUsage[] =
    R"(Records what a model's heads attend to, for cluster_heads.py.

  prefill-calibrate --model=DIR --out=DUMPS PROMPTS...

PROMPTS are files, or folders of files: .json with token ids (a list, or an object with "token_ids"),
or .txt for byte-level models, whose config.json says "byte_tokens": true. The folder a file lies in names its domain. Every prompt runs with
dense attention and gives DUMPS/<domain>.<name>.safetensors.)";

absl::StatusOr<DeviceChoice> ReadDevice(const std::string& name) {
  if (name == "auto") return DeviceChoice::kAuto;
  if (name == "cpu") return DeviceChoice::kCpu;
  if (name == "cuda") return DeviceChoice::kCuda;
  return absl::InvalidArgumentError(
      absl::StrCat("--device=", name, " is not one of auto, cpu, cuda"));
}

}  // namespace

absl::StatusOr<CalibrateOptions> OptionsFromCommandLine(int argc, char** argv) {
  const process::ProgramHelp help = {
      .usage = kUsage,
      .groups = {
          {"Model and prompts", {"model", "ignore_config", "out", "device", "cpu_threads", "bos"}},
          {"What is recorded", {"block_tokens", "grid", "gamma", "min_budget_tokens"}}}};
  const std::vector<char*> positional = process::ParseCommandLine(argc, argv, help);
  std::vector<std::string> problems;
  CalibrateOptions options;
  options.checkpoint_dir = absl::GetFlag(FLAGS_model);
  options.overruled_config_keys = absl::GetFlag(FLAGS_ignore_config);
  options.out_dir = absl::GetFlag(FLAGS_out);
  options.prompts.assign(positional.begin() + 1, positional.end());
  options.bos = absl::GetFlag(FLAGS_bos);
  options.cpu_threads = absl::GetFlag(FLAGS_cpu_threads);
  options.recorder.block_tokens = absl::GetFlag(FLAGS_block_tokens);
  options.recorder.max_grid = absl::GetFlag(FLAGS_grid);
  options.recorder.gamma = absl::GetFlag(FLAGS_gamma);
  options.recorder.min_budget_tokens = absl::GetFlag(FLAGS_min_budget_tokens);
  if (const auto device = ReadDevice(absl::GetFlag(FLAGS_device)); device.ok()) {
    options.device = *device;
  } else {
    problems.emplace_back(device.status().message());
  }

  const RecorderOptions& recorder = options.recorder;
  if (options.checkpoint_dir.empty()) problems.push_back("--model is missing");
  if (options.out_dir.empty()) problems.push_back("--out is missing");
  if (options.prompts.empty()) problems.push_back("no prompts are given (see --help)");
  if (options.cpu_threads < 0) {
    problems.push_back(absl::StrCat("--cpu_threads=", options.cpu_threads, " is negative"));
  }
  if (recorder.block_tokens != 64 && recorder.block_tokens != 128) {
    problems.push_back(
        absl::StrCat("--block_tokens=", recorder.block_tokens, " is not one of 64, 128"));
  }
  if (recorder.max_grid < 0) {
    problems.push_back(absl::StrCat("--grid=", recorder.max_grid, " is negative"));
  }
  if (!(recorder.gamma > 0.0f && recorder.gamma <= 1.0f)) {
    problems.push_back(absl::StrCat("--gamma=", recorder.gamma, " is outside (0, 1]"));
  }
  if (recorder.min_budget_tokens < 0) {
    problems.push_back(
        absl::StrCat("--min_budget_tokens=", recorder.min_budget_tokens, " is negative"));
  }
  if (!problems.empty()) return absl::InvalidArgumentError(absl::StrJoin(problems, "; "));
  return options;
}

}  // namespace prefilld::model
