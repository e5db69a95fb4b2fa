#include "tests/model/prompt_run.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>

namespace prefilld::model {
namespace {

template <typename T>
T OrDie(absl::StatusOr<T> value) {
  if (value.ok()) return *std::move(value);
  std::fprintf(stderr, "%s\n", value.status().ToString().c_str());
  abort();
}

void OrDie(const absl::Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "%s\n", status.ToString().c_str());
  abort();
}

}  // namespace

EngineOptions CpuEngineOptions(const std::string& checkpoint_dir, int64_t max_tokens) {
  EngineOptions options;
  options.checkpoint_dir = checkpoint_dir;
  options.device = DeviceChoice::kCpu;
  options.cpu_threads = 2;
  options.max_tokens = max_tokens;
  return options;
}

std::unique_ptr<PrefillEngine> NewEngine(const EngineOptions& options) {
  return OrDie(CreatePrefillEngine(options));
}

AttentionOptions DenseAttention() {
  AttentionOptions options;
  options.policy = AttentionPolicy::kDense;
  return options;
}

std::vector<uint32_t> RandomTokens(int64_t count, int64_t vocab_size, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<uint32_t> tokens(count);
  for (uint32_t& token : tokens) token = static_cast<uint32_t>(random() % vocab_size);
  return tokens;
}

KvSelection WholeLayer(const ModelConfig& config, int64_t num_tokens, int block_tokens,
                       kernels::KvOrder order, kernels::DType dtype) {
  return {.first_block = 0,
          .num_blocks = kernels::CeilDiv(num_tokens, block_tokens),
          .block_tokens = block_tokens,
          .first_head = 0,
          .num_heads = config.num_kv_heads,
          .order = order,
          .dtype = dtype};
}

std::vector<uint8_t> PackLayer(PrefillEngine& engine, PrefillSequence& sequence, int layer,
                               const KvSelection& selection) {
  const auto bytes = static_cast<size_t>(PackedBytes(selection, engine.info().config.head_dim));
  DeviceBuffer staging = OrDie(engine.AllocateStaging(bytes));
  OrDie(sequence.PackKv(layer, selection, staging.data()));
  std::vector<uint8_t> packed(bytes);
  std::memcpy(packed.data(), staging.data(), bytes);
  return packed;
}

std::unique_ptr<PrefillSequence> RunLayers(PrefillEngine& engine, absl::Span<const uint32_t> tokens,
                                           const AttentionOptions& options, bool logprobs) {
  std::unique_ptr<PrefillSequence> sequence = OrDie(engine.Start(tokens, options, logprobs));
  for (int layer = 0; layer < engine.info().config.num_layers; ++layer) {
    OrDie(sequence->RunLayer());
    sequence->ReleaseKv(layer);
  }
  return sequence;
}

namespace {

// Runs the layers and computes the logits.
std::vector<PromptRun> Compute(PrefillEngine& engine, PrefillSequence& sequence,
                               const std::vector<int64_t>& lengths) {
  const ModelConfig& config = engine.info().config;
  std::vector<PromptRun> runs(lengths.size());
  for (int layer = 0; layer < config.num_layers; ++layer) {
    const LayerReport report = OrDie(sequence.RunLayer());
    for (size_t i = 0; i < runs.size(); ++i) {
      runs[i].reports.push_back(report);
      KvSelection selection =
          WholeLayer(config, lengths[i], 128, kernels::KvOrder::kHnd, kernels::DType::kFp32);
      selection.prompt = static_cast<int>(i);
      const std::vector<uint8_t> packed = PackLayer(engine, sequence, layer, selection);
      std::vector<float> kv(packed.size() / sizeof(float));
      std::memcpy(kv.data(), packed.data(), packed.size());
      runs[i].kv.push_back(std::move(kv));
    }
    sequence.ReleaseKv(layer);
  }
  const std::vector<std::vector<float>> logits = OrDie(sequence.FinalLogits());
  if (logits.size() != runs.size()) abort();
  for (size_t i = 0; i < runs.size(); ++i) {
    runs[i].logits = logits[i];
    runs[i].cached_tokens = sequence.cached_tokens();
    runs[i].policy = sequence.policy();
  }
  return runs;
}

}  // namespace

PromptLogprobs AllLogprobs(PrefillSequence& sequence, int prompt, int* num_parts) {
  PromptLogprobs all;
  for (int parts = 0;; ++parts) {
    const auto first = static_cast<int64_t>(all.of_token.size());
    const PromptLogprobs part = OrDie(sequence.Logprobs(prompt, first));
    if (num_parts != nullptr) *num_parts = parts;
    if (part.of_token.empty()) return all;
    all.of_token.insert(all.of_token.end(), part.of_token.begin(), part.of_token.end());
    all.of_best.insert(all.of_best.end(), part.of_best.begin(), part.of_best.end());
  }
}

std::vector<PromptRun> RunPrompts(PrefillEngine& engine,
                                  const std::vector<std::vector<uint32_t>>& prompts,
                                  const AttentionOptions& options) {
  std::vector<PromptInput> inputs;
  std::vector<int64_t> lengths;
  for (const std::vector<uint32_t>& prompt : prompts) {
    inputs.push_back({prompt, options, /*logprobs=*/true});
    lengths.push_back(static_cast<int64_t>(prompt.size()));
  }
  const std::unique_ptr<PrefillSequence> sequence = OrDie(engine.Start(inputs));
  std::vector<PromptRun> runs = Compute(engine, *sequence, lengths);
  for (size_t i = 0; i < runs.size(); ++i) {
    runs[i].logprobs = AllLogprobs(*sequence, static_cast<int>(i));
  }
  return runs;
}

PromptRun RunPrompt(PrefillEngine& engine, const PromptInput& input) {
  const auto sequence = OrDie(engine.Start(absl::MakeConstSpan(&input, 1)));
  return Compute(engine, *sequence, {static_cast<int64_t>(input.tokens.size())}).front();
}

PromptRun RunPrompt(PrefillEngine& engine, const std::vector<uint32_t>& tokens,
                    const AttentionOptions& options) {
  return RunPrompt(engine, {tokens, options});
}

}  // namespace prefilld::model
