#include <cmath>
#include <cstring>
#include <random>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "model/sparse/head_clusters.h"
#include "model/sparse/pattern_sharing.h"
#include "tests/bench/device/attention_check.h"
#include "tests/bench/device/benches.h"

namespace prefilld::bench {
namespace {

using kernels::CeilDiv;
using kernels::HeadWork;
using kernels::PatternWords;

constexpr int kBlock = 128;

std::string Shape(const AttentionData& data) {
  return absl::StrFormat("%d tokens %d/%d d%d", data.num_tokens, data.num_heads, data.num_kv_heads,
                         data.head_dim);
}

double CausalTflop(const AttentionData& data) {
  return 2.0 * data.num_heads * data.head_dim * static_cast<double>(data.num_tokens) *
         static_cast<double>(data.num_tokens) / 1e12;
}

// One random pattern per head: block 0, the diagonal, and each other block with a given
// probability.
struct RandomPatterns {
  std::vector<uint32_t> words;  // [num_heads, n, PatternWords(n)]
  model::DeviceBuffer on_device;
  double density = 0.0;  // blocks / causal blocks
  int64_t blocks = 0;
};

absl::StatusOr<RandomPatterns> MakePatterns(model::Device& device, const AttentionData& data,
                                            double probability) {
  const int64_t n = CeilDiv(data.num_tokens, kBlock), row_words = PatternWords(n);
  std::mt19937 generator(3);
  RandomPatterns patterns;
  std::vector<uint32_t>& words = patterns.words;
  words.resize(data.num_heads * n * row_words);
  const auto threshold = static_cast<uint32_t>(probability * 4294967295.0);
  for (int64_t row = 0; row < data.num_heads * n; ++row) {
    const int64_t diagonal = row % n;
    for (int64_t c = 0; c <= diagonal; ++c) {
      if (c != 0 && c != diagonal && generator() > threshold) continue;
      words[row * row_words + c / 32] |= 1u << (c % 32);
      ++patterns.blocks;
    }
  }
  patterns.density = static_cast<double>(patterns.blocks) /
                     (static_cast<double>(data.num_heads) * static_cast<double>(n * (n + 1) / 2));
  absl::StatusOr<model::DeviceBuffer> buffer = device.Allocate(words.size() * sizeof(uint32_t));
  if (!buffer.ok()) return buffer.status();
  patterns.on_device = *std::move(buffer);
  absl::Status status =
      device.Upload(patterns.on_device.data(), words.data(), patterns.on_device.bytes());
  if (!status.ok()) return status;
  return patterns;
}

// Returns ||out - reference|| / ||reference|| of two tensors in the compute dtype, given as raw
// bytes.
double RelativeError(const std::vector<uint8_t>& out, const std::vector<uint8_t>& reference,
                     kernels::DType dtype) {
  const auto at = [&](const std::vector<uint8_t>& bytes, size_t i) -> double {
    uint32_t bits = 0;
    if (dtype == kernels::DType::kFp32) {
      std::memcpy(&bits, &bytes[i * 4], 4);
    } else {
      uint16_t half;
      std::memcpy(&half, &bytes[i * 2], 2);
      bits = static_cast<uint32_t>(half) << 16;
    }
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  };
  double error = 0.0, norm = 0.0;
  for (size_t i = 0; i < out.size() / kernels::SizeOf(dtype); ++i) {
    const double a = at(out, i), b = at(reference, i);
    error += (a - b) * (a - b);
    norm += b * b;
  }
  return std::sqrt(error / norm);
}

absl::Status Attend(model::Device& device, const AttentionData& data,
                    const std::vector<HeadWork>& work) {
  kernels::AttentionParams params = data.Params();
  params.work = work.data();
  params.num_work = static_cast<int>(work.size());
  return device.ops().Attention(params);
}

}  // namespace

absl::Status BenchAttention(model::Device& device, const AttentionData& data,
                            const std::vector<int>& densities, int runs, Report* report) {
  const int64_t n = CeilDiv(data.num_tokens, kBlock), row_words = PatternWords(n);
  const absl::StatusOr<AttentionCheck> check = AttentionCheck::Create(&device, &data);
  if (!check.ok()) return check.status();
  std::vector<HeadWork> dense_work(data.num_heads), mass_work(data.num_heads);
  Row dense{.what = "attention dense", .shape = Shape(data), .tflop = CausalTflop(data)};
  {
    absl::StatusOr<model::DeviceBuffer> mass =
        device.Allocate(data.num_heads * n * n * sizeof(float));
    if (!mass.ok()) return mass.status();
    for (int head = 0; head < data.num_heads; ++head) {
      dense_work[head].head = head;
      mass_work[head] = {.head = head, .block_mass = mass->as<float>() + head * n * n};
    }
    Row with_mass{
        .what = "attention dense, block mass", .shape = Shape(data), .tflop = CausalTflop(data)};
    const auto attend_dense = [&] { return Attend(device, data, dense_work); };
    const auto attend_with_mass = [&] { return Attend(device, data, mass_work); };
    absl::Status status = MeasureInTurns(
        runs, {{device, attend_dense, &dense}, {device, attend_with_mass, &with_mass}});
    if (!status.ok()) return status;
    // The output is still that of attention with mass, whose turn was the last. Attention without
    // mass runs once more before its check.
    const absl::StatusOr<double> mass_error = check->Error({});
    if (!mass_error.ok()) return mass_error.status();
    if (status = Attend(device, data, dense_work); !status.ok()) return status;
    const absl::StatusOr<double> dense_error = check->Error({});
    if (!dense_error.ok()) return dense_error.status();
    dense.more = {{"error", *dense_error}};
    with_mass.more = {{"vs_dense", with_mass.median_ms / dense.median_ms}, {"error", *mass_error}};
    report->Add(dense);
    report->Add(std::move(with_mass));
  }
  for (int density : densities) {
    absl::StatusOr<RandomPatterns> patterns = MakePatterns(device, data, density / 100.0);
    if (!patterns.ok()) return patterns.status();
    std::vector<HeadWork> work(data.num_heads);
    for (int head = 0; head < data.num_heads; ++head) {
      work[head] = {.head = head,
                    .pattern = patterns->on_device.as<uint32_t>() + head * n * row_words};
    }
    Row row{.what = absl::StrCat("attention block-sparse ", density, " %"), .shape = Shape(data)};
    row.tflop =
        4.0 * kBlock * kBlock * data.head_dim * static_cast<double>(patterns->blocks) / 1e12;
    absl::Status status = Measure(
        device, runs, [&] { return Attend(device, data, work); }, &row);
    if (!status.ok()) return status;
    const absl::StatusOr<double> error = check->Error(patterns->words);
    if (!error.ok()) return error.status();
    row.more = {{"density", patterns->density},
                {"vs_linear", row.median_ms / (patterns->density * dense.median_ms)},
                {"error", *error}};
    report->Add(std::move(row));
  }
  return absl::OkStatus();
}

absl::Status BenchSharing(model::Device& device, AttentionData& data,
                          const std::string& clusters_path, const model::AttentionOptions& options,
                          int runs, Report* report) {
  model::ModelConfig config;
  config.num_layers = 2;
  config.num_heads = data.num_heads;
  config.num_kv_heads = data.num_kv_heads;
  config.head_dim = data.head_dim;
  absl::StatusOr<model::HeadClusters> clusters = model::LoadHeadClusters(clusters_path, config);
  if (!clusters.ok()) return clusters.status();
  const auto workspace =
      model::SharingWorkspace::Create(&device, &config, &*clusters, data.num_tokens, kBlock);
  if (!workspace.ok()) return workspace.status();
  auto sharing = model::PatternSharing::Create(workspace->get(), data.num_tokens);
  if (!sharing.ok()) return sharing.status();

  std::vector<HeadWork> dense(data.num_heads);
  for (int head = 0; head < data.num_heads; ++head) dense[head].head = head;
  kernels::AttentionParams params = data.Params();
  params.work = dense.data();
  params.num_work = data.num_heads;
  absl::Status status = device.ops().Attention(params);
  std::vector<uint8_t> reference(data.out.bytes()), out(data.out.bytes());
  if (status.ok()) status = device.Download(reference.data(), data.out.data(), reference.size());
  if (!status.ok()) return status;

  const std::pair<int, const char*> layers[] = {{0, "share, a layer that makes its pivots"},
                                                {1, "share, pivots exist"}};
  for (const auto& [layer, what] : layers) {
    model::LayerReport last;
    Row row{.what = what, .shape = Shape(data)};
    // Layer 1 attends with the pivots that layer 0 left behind.
    status = Measure(
        device, runs,
        [&, layer = layer] {
          last = {};
          if (layer == 0) (*sharing)->StartPrompt(data.num_tokens, options);
          return (*sharing)->Attend(layer, data.Params(), &last);
        },
        &row);
    if (status.ok()) status = (*sharing)->Report(&last);
    if (status.ok()) status = device.Download(out.data(), data.out.data(), out.size());
    if (!status.ok()) return status;
    row.more = {{"density", last.density},
                {"error", RelativeError(out, reference, device.traits().compute_dtype)},
                {"pattern_ms", static_cast<double>(last.pattern_us) / 1e3},
                {"attention_ms", static_cast<double>(last.attention_us) / 1e3},
                {"estimate_ms", (*sharing)->stages().estimate_us / 1e3},
                {"select_ms", (*sharing)->stages().select_us / 1e3},
                {"decide_ms", (*sharing)->stages().decide_us / 1e3},
                {"host_ms", (*sharing)->stages().host_us / 1e3},
                {"pivots", last.pivot_heads},
                {"shared", last.shared_heads}};
    report->Add(std::move(row));
  }
  return absl::OkStatus();
}

}  // namespace prefilld::bench
