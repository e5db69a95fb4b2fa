// prefill-bench measures how fast a device runs a whole prefill and its parts.
//
//   prefill-bench --mode=attention [--tokens=…] [--qkv=FOLDER [--clusters=FILE]]
//   prefill-bench --mode=scores [--tokens=…] [--stride=8]
//   prefill-bench --mode=pack [--tokens=…] [--threads=…]
//   prefill-bench --mode=layer [--tokens=…]
//   prefill-bench --mode=linears [--tokens=…] [--layers=28]
//   prefill-bench --mode=prefill --model=FOLDER --prompt=TOKENS.json [--policies=dense,share]
//   prefill-bench --mode=batch --model=FOLDER --prompt=TOKENS.json [--batches=8]
#include <algorithm>
#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "model/prefill/packed_prompts.h"
#include "proto/process/command_line.h"
#include "proto/process/openmp_waiting.h"
#include "tests/bench/device/benches.h"

ABSL_FLAG(std::string, mode, "attention",
          "attention, scores, pack, layer, linears, prefill or batch.");
ABSL_FLAG(std::string, device, "auto", "auto, cpu or cuda.");
ABSL_FLAG(std::vector<std::string>, tokens, {"8192"}, "Prompt lengths, comma-separated.");
ABSL_FLAG(int32_t, heads, 28, "Query heads, for modes attention, scores and layer.");
ABSL_FLAG(int32_t, kv_heads, 4, "KV heads, likewise.");
ABSL_FLAG(int32_t, head_dim, 128, "Likewise.");
ABSL_FLAG(int64_t, hidden, 3584, "For mode layer.");
ABSL_FLAG(int64_t, intermediate, 18944, "For mode layer.");
ABSL_FLAG(int32_t, layers, 28, "For mode linears.");
ABSL_FLAG(
    int64_t, tile_tokens, 0,
    "For modes linears and prefill: tokens a product takes at a time; 0: the engine's choice, "
    "8192 on a GPU.");
ABSL_FLAG(std::optional<int64_t>, max_graph_tokens, std::nullopt,
          "For modes prefill and batch: dense layers of up to so many tokens are replayed as CUDA "
          "graphs. Not set: the engine's choice.");
ABSL_FLAG(int64_t, most_attention_work, 0,
          "For modes prefill and batch: the most attention between two points at which others may "
          "go first, in products of Q K^T. 0: what takes some 30 ms.");
ABSL_FLAG(std::vector<std::string>, densities, (std::vector<std::string>{"5", "10", "20", "40"}),
          "Percentages of random patterns, for mode attention.");
ABSL_FLAG(std::vector<std::string>, threads, (std::vector<std::string>{"1", "4", "8"}),
          "Numbers of packing threads, for mode pack.");
ABSL_FLAG(int32_t, stride, 8, "Tokens of a fold, for mode scores.");
ABSL_FLAG(std::string, qkv, "",
          "Folder with model.safetensors of q [1, N, H, d], k and v [1, N, H_kv, d], bf16, instead "
          "of random data.");
ABSL_FLAG(std::string, clusters, "",
          "Head clusters of layers 0 and 1 for --qkv: also run everything pattern sharing does.");
ABSL_FLAG(std::string, model, "", "Checkpoint folder, for mode prefill.");
ABSL_FLAG(std::string, prompt, "",
          "JSON list of token ids, for mode prefill. Its beginning is used for shorter --tokens.");
ABSL_FLAG(std::vector<std::string>, policies, (std::vector<std::string>{"dense", "share"}),
          "For mode prefill: dense, vertical_slash, share, auto.");
ABSL_FLAG(std::vector<std::string>, batches, {"8"},
          "For mode batch: numbers of dense prompts in one pass, beside as many passes of one.");
ABSL_FLAG(double, gamma, 0.9, "Mass that patterns cover.");
ABSL_FLAG(double, tau, 0.4, "Distance below which heads share.");
ABSL_FLAG(double, coverage, 0.85, "Clusters whose vertical-slash covers more do not share.");
ABSL_FLAG(int32_t, runs, 5, "Timed runs; the median is reported.");
ABSL_FLAG(bool, warm_up, true, "Run once before the timed runs, in mode prefill.");
ABSL_FLAG(double, peak_tflops, 0.0, "Ceiling for the percentage column.");
ABSL_FLAG(double, peak_gbps, 0.0, "Ceiling for the percentage column.");
ABSL_FLAG(std::string, json, "", "Also write the rows to this file.");
ABSL_FLAG(std::string, commit, "", "Noted in --json.");

namespace prefilld::bench {
namespace {

absl::StatusOr<model::DeviceChoice> Choice() {
  const std::string device = absl::GetFlag(FLAGS_device);
  if (device == "auto") return model::DeviceChoice::kAuto;
  if (device == "cpu") return model::DeviceChoice::kCpu;
  if (device == "cuda") return model::DeviceChoice::kCuda;
  return absl::InvalidArgumentError(absl::StrCat("--device ", device, " unknown"));
}

absl::StatusOr<std::vector<int64_t>> Numbers(const std::vector<std::string>& texts) {
  std::vector<int64_t> numbers;
  for (const std::string& text : texts) {
    int64_t number;
    if (!absl::SimpleAtoi(text, &number) || number < 1) {
      return absl::InvalidArgumentError(absl::StrCat("'", text, "' is not a positive number"));
    }
    numbers.push_back(number);
  }
  return numbers;
}

absl::StatusOr<model::AttentionPolicy> Policy(const std::string& name) {
  const auto policy = model::ParsePolicy(name);
  if (policy.has_value() && !model::IsBaseline(*policy)) return *policy;
  return absl::InvalidArgumentError(absl::StrCat("policy '", name, "' unknown"));
}

model::AttentionOptions Options(model::AttentionPolicy policy) {
  model::AttentionOptions options;
  options.policy = policy;
  options.gamma = static_cast<float>(absl::GetFlag(FLAGS_gamma));
  options.tau = static_cast<float>(absl::GetFlag(FLAGS_tau));
  options.coverage = static_cast<float>(absl::GetFlag(FLAGS_coverage));
  return options;
}

absl::Status RunAttention(model::Device& device, Report* report) {
  const int runs = absl::GetFlag(FLAGS_runs);
  absl::StatusOr<std::vector<int64_t>> densities = Numbers(absl::GetFlag(FLAGS_densities));
  if (!densities.ok()) return densities.status();
  const std::vector<int> percents(densities->begin(), densities->end());
  if (const std::string folder = absl::GetFlag(FLAGS_qkv); !folder.empty()) {
    absl::StatusOr<AttentionData> data = LoadAttentionData(device, folder);
    if (!data.ok()) return data.status();
    absl::Status status = BenchAttention(device, *data, {}, runs, report);
    if (!status.ok() || absl::GetFlag(FLAGS_clusters).empty()) return status;
    return BenchSharing(device, *data, absl::GetFlag(FLAGS_clusters),
                        Options(model::AttentionPolicy::kShare), runs, report);
  }
  absl::StatusOr<std::vector<int64_t>> lengths = Numbers(absl::GetFlag(FLAGS_tokens));
  if (!lengths.ok()) return lengths.status();
  for (int64_t length : *lengths) {
    absl::StatusOr<AttentionData> data =
        RandomAttentionData(device, length, absl::GetFlag(FLAGS_heads),
                            absl::GetFlag(FLAGS_kv_heads), absl::GetFlag(FLAGS_head_dim));
    if (!data.ok()) return data.status();
    absl::Status status = BenchAttention(device, *data, percents, runs, report);
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

absl::Status RunScores(model::Device& device, Report* report) {
  absl::StatusOr<std::vector<int64_t>> lengths = Numbers(absl::GetFlag(FLAGS_tokens));
  if (!lengths.ok()) return lengths.status();
  for (int64_t length : *lengths) {
    absl::StatusOr<AttentionData> data =
        RandomAttentionData(device, length, absl::GetFlag(FLAGS_heads),
                            absl::GetFlag(FLAGS_kv_heads), absl::GetFlag(FLAGS_head_dim));
    if (!data.ok()) return data.status();
    absl::Status status =
        BenchScores(device, *data, absl::GetFlag(FLAGS_stride), absl::GetFlag(FLAGS_runs), report);
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

absl::Status RunPack(model::Device& device, Report* report) {
  absl::StatusOr<std::vector<int64_t>> lengths = Numbers(absl::GetFlag(FLAGS_tokens));
  if (!lengths.ok()) return lengths.status();
  absl::StatusOr<std::vector<int64_t>> threads = Numbers(absl::GetFlag(FLAGS_threads));
  if (!threads.ok()) return threads.status();
  for (int64_t length : *lengths) {
    absl::StatusOr<AttentionData> data =
        RandomAttentionData(device, length, absl::GetFlag(FLAGS_heads),
                            absl::GetFlag(FLAGS_kv_heads), absl::GetFlag(FLAGS_head_dim));
    if (!data.ok()) return data.status();
    absl::Status status = BenchPack(device, *data, *threads, absl::GetFlag(FLAGS_runs), report);
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

LayerShape ShapeOfLayer() {
  return {.hidden = absl::GetFlag(FLAGS_hidden),
          .intermediate = absl::GetFlag(FLAGS_intermediate),
          .num_heads = absl::GetFlag(FLAGS_heads),
          .num_kv_heads = absl::GetFlag(FLAGS_kv_heads),
          .head_dim = absl::GetFlag(FLAGS_head_dim)};
}

absl::Status RunLinears(model::Device& device, model::DeviceChoice choice, Report* report) {
  absl::StatusOr<std::vector<int64_t>> lengths = Numbers(absl::GetFlag(FLAGS_tokens));
  if (!lengths.ok()) return lengths.status();
  const int64_t tile = absl::GetFlag(FLAGS_tile_tokens);
  for (int64_t length : *lengths) {
    absl::StatusOr<std::unique_ptr<model::Device>> tuned = model::CreateDevice(choice, 0);
    if (!tuned.ok()) return tuned.status();
    absl::Status status = BenchLinears(device, **tuned, ShapeOfLayer(), absl::GetFlag(FLAGS_layers),
                                       length, tile == 0 ? 8192 : tile, report);
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

absl::Status RunLayer(model::Device& device, Report* report) {
  absl::StatusOr<std::vector<int64_t>> lengths = Numbers(absl::GetFlag(FLAGS_tokens));
  if (!lengths.ok()) return lengths.status();
  for (int64_t length : *lengths) {
    absl::Status status =
        BenchLayerOps(device, ShapeOfLayer(), length, absl::GetFlag(FLAGS_runs), report);
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<uint32_t>> LoadPrompt(int64_t num_tokens) {
  const std::string path = absl::GetFlag(FLAGS_prompt);
  std::ifstream file(path);
  const nlohmann::json json = nlohmann::json::parse(file, nullptr, /*allow_exceptions=*/false);
  if (!json.is_array()) {
    return absl::InvalidArgumentError(
        absl::StrCat("--prompt ", path, " is no JSON list of token ids"));
  }
  if (num_tokens > static_cast<int64_t>(json.size())) {
    return absl::InvalidArgumentError(
        absl::StrCat("--prompt holds ", json.size(), " tokens, fewer than ", num_tokens));
  }
  return json.get<std::vector<uint32_t>>();
}

absl::Status RunPolicies(model::PrefillEngine& engine, const std::vector<uint32_t>& tokens,
                         Report* report) {
  std::vector<model::AttentionOptions> settings;
  for (const std::string& name : absl::GetFlag(FLAGS_policies)) {
    absl::StatusOr<model::AttentionPolicy> policy = Policy(name);
    if (!policy.ok()) return policy.status();
    model::AttentionOptions options = Options(*policy);
    options.crossover_tokens = engine.info().default_attention.crossover_tokens;
    settings.push_back(options);
  }
  report->Fact("crossover_tokens", absl::StrCat(engine.info().default_attention.crossover_tokens));
  return BenchPrefill(engine, tokens, settings, absl::GetFlag(FLAGS_warm_up),
                      absl::GetFlag(FLAGS_runs), report);
}

// Runs mode prefill or, if `batches` is not empty, mode batch.
absl::Status RunEngine(model::DeviceChoice device, const std::vector<int64_t>& batches,
                       Report* report) {
  absl::StatusOr<std::vector<int64_t>> lengths = Numbers(absl::GetFlag(FLAGS_tokens));
  if (!lengths.ok()) return lengths.status();
  const int64_t longest = *std::max_element(lengths->begin(), lengths->end());
  absl::StatusOr<std::vector<uint32_t>> prompt = LoadPrompt(longest);
  if (!prompt.ok()) return prompt.status();
  model::EngineOptions options;
  options.checkpoint_dir = absl::GetFlag(FLAGS_model);
  options.clusters_path = absl::GetFlag(FLAGS_clusters);
  options.device = device;
  options.max_tokens = longest;
  options.tile_tokens = absl::GetFlag(FLAGS_tile_tokens);
  options.max_graph_tokens = absl::GetFlag(FLAGS_max_graph_tokens);
  options.most_attention_work = absl::GetFlag(FLAGS_most_attention_work);
  options.max_batch_tokens = 0;
  for (const int64_t batch : batches) {
    const int64_t prompts = std::max<int64_t>(batch, model::kFullBatchPrompts);
    options.max_batch_tokens =
        std::max(*options.max_batch_tokens, prompts * model::PackedPrompts::PaddedTokens(longest));
  }
  absl::StatusOr<std::unique_ptr<model::PrefillEngine>> engine = CreatePrefillEngine(options);
  if (!engine.ok()) return engine.status();
  report->Fact("device", (*engine)->info().device_name);
  report->Fact("model", (*engine)->info().model_name);
  for (int64_t length : *lengths) {
    const std::vector<uint32_t> tokens(prompt->begin(), prompt->begin() + length);
    absl::Status status =
        batches.empty() ? RunPolicies(**engine, tokens, report) : absl::OkStatus();
    for (size_t i = 0; i < batches.size() && status.ok(); ++i) {
      status = BenchBatch(**engine, tokens, static_cast<int>(batches[i]), absl::GetFlag(FLAGS_runs),
                          report);
    }
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

absl::Status Run() {
  Report report({absl::GetFlag(FLAGS_peak_tflops), absl::GetFlag(FLAGS_peak_gbps)});
  report.Fact("mode", absl::GetFlag(FLAGS_mode));
  report.Fact("commit", absl::GetFlag(FLAGS_commit));
  absl::StatusOr<model::DeviceChoice> choice = Choice();
  if (!choice.ok()) return choice.status();
  absl::Status status;
  const std::string mode = absl::GetFlag(FLAGS_mode);
  if (mode == "prefill") {
    status = RunEngine(*choice, /*batches=*/{}, &report);
  } else if (mode == "batch") {
    absl::StatusOr<std::vector<int64_t>> batches = Numbers(absl::GetFlag(FLAGS_batches));
    if (!batches.ok()) return batches.status();
    status = RunEngine(*choice, *batches, &report);
  } else if (mode == "attention" || mode == "scores" || mode == "pack" || mode == "layer" ||
             mode == "linears") {
    absl::StatusOr<std::unique_ptr<model::Device>> device = model::CreateDevice(*choice, 0);
    if (!device.ok()) return device.status();
    report.Fact("device", (*device)->traits().name);
    if (mode == "attention") {
      status = RunAttention(**device, &report);
    } else if (mode == "scores") {
      status = RunScores(**device, &report);
    } else if (mode == "pack") {
      status = RunPack(**device, &report);
    } else if (mode == "layer") {
      status = RunLayer(**device, &report);
    } else {
      status = RunLinears(**device, *choice, &report);
    }
  } else {
    return absl::InvalidArgumentError(absl::StrCat("--mode ", mode, " unknown"));
  }
  if (!absl::GetFlag(FLAGS_json).empty()) {
    status.Update(report.WriteJson(absl::GetFlag(FLAGS_json)));
  }
  return status;
}

}  // namespace
}  // namespace prefilld::bench

int main(int argc, char** argv) {
  prefilld::process::LetOpenMpThreadsSleep(argv).IgnoreError();
  prefilld::process::ParseCommandLine(
      argc, argv,
      {.usage = "How fast a device runs the parts of a prefill, and the whole.",
       .groups = {
           {"What runs", {"mode", "device", "runs", "warm_up", "threads"}},
           {"Shapes",
            {"tokens", "heads", "kv_heads", "head_dim", "hidden", "intermediate", "layers",
             "tile_tokens", "max_graph_tokens", "most_attention_work", "batches"}},
           {"Attention", {"densities", "stride", "qkv", "clusters", "gamma", "tau", "coverage"}},
           {"Whole prefills", {"model", "prompt", "policies"}},
           {"Report", {"peak_tflops", "peak_gbps", "json", "commit"}}}});
  const absl::Status status = prefilld::bench::Run();
  if (!status.ok()) std::fprintf(stderr, "prefill-bench: %s\n", status.ToString().c_str());
  return status.ok() ? 0 : 1;
}
