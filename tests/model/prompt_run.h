// Makes engines, and runs whole prompts through them and keeps everything that comes out. The
// functions abort on an error.
#ifndef PREFILLD_TESTS_MODEL_PROMPT_RUN_H_
#define PREFILLD_TESTS_MODEL_PROMPT_RUN_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/types/span.h"
#include "model/prefill/prefill_engine.h"

namespace prefilld::model {

// Options for an engine on the CPU with two threads.
EngineOptions CpuEngineOptions(const std::string& checkpoint_dir, int64_t max_tokens);
std::unique_ptr<PrefillEngine> NewEngine(const EngineOptions& options);

AttentionOptions DenseAttention();

// The outcome of one prompt. `kv` holds the keys and values of each layer as one block of HND fp32:
// [num_kv_heads, num_tokens rounded up to a block, head_dim], values after keys.
struct PromptRun {
  std::vector<LayerReport> reports;
  std::vector<std::vector<float>> kv;  // [num_layers]
  std::vector<float> logits;
  PromptLogprobs logprobs;  // set by RunPrompts
  int64_t cached_tokens = 0;
  AttentionPolicy policy = AttentionPolicy::kAuto;  // the one that ran
};

// Makes uniform ids below vocab_size, as a function of the seed.
std::vector<uint32_t> RandomTokens(int64_t count, int64_t vocab_size, uint64_t seed = 1);

// Packs a layer's whole KV in the given form.
std::vector<uint8_t> PackLayer(PrefillEngine& engine, PrefillSequence& sequence, int layer,
                               const KvSelection& selection);

// Selects every block of every head.
KvSelection WholeLayer(const ModelConfig& config, int64_t num_tokens, int block_tokens,
                       kernels::KvOrder order, kernels::DType dtype);

// Runs all layers and releases their KV. FinalLogits comes next and, if asked for, Logprobs.
std::unique_ptr<PrefillSequence> RunLayers(PrefillEngine& engine, absl::Span<const uint32_t> tokens,
                                           const AttentionOptions& options, bool logprobs);

// Returns all log-probabilities of a prompt. `num_parts`, if given, is set to how many parts had
// some.
PromptLogprobs AllLogprobs(PrefillSequence& sequence, int prompt = 0, int* num_parts = nullptr);

// Runs prompts that are computed together.
std::vector<PromptRun> RunPrompts(PrefillEngine& engine,
                                  const std::vector<std::vector<uint32_t>>& prompts,
                                  const AttentionOptions& options);

// Runs one prompt alone, without its log-probabilities.
PromptRun RunPrompt(PrefillEngine& engine, const PromptInput& input);
PromptRun RunPrompt(PrefillEngine& engine, const std::vector<uint32_t>& tokens,
                    const AttentionOptions& options);

}  // namespace prefilld::model

#endif  // PREFILLD_TESTS_MODEL_PROMPT_RUN_H_
