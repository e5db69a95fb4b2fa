// Engines made in a line, and whole prompts run through them: everything that comes out is kept.
// What is called here aborts on an error.
#ifndef PREFILLD_TESTS_MODEL_PROMPT_RUN_H_
#define PREFILLD_TESTS_MODEL_PROMPT_RUN_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/types/span.h"
#include "model/prefill/prefill_engine.h"

namespace prefilld::model {

// Two threads of the CPU.
EngineOptions CpuEngineOptions(const std::string& checkpoint_dir, int64_t max_tokens);
std::unique_ptr<PrefillEngine> NewEngine(const EngineOptions& options);

AttentionOptions DenseAttention();

// Keys and values of one layer as one block of HND fp32: [num_kv_heads, num_tokens rounded up to
// a block, head_dim], values after keys.
struct PromptRun {
  std::vector<LayerReport> reports;
  std::vector<std::vector<float>> kv;  // [num_layers]
  std::vector<float> logits;
  PromptLogprobs logprobs;  // of RunPrompts
};

// Uniform ids below vocab_size, a function of the seed.
std::vector<uint32_t> RandomTokens(int64_t count, int64_t vocab_size, uint64_t seed = 1);

// Packs a layer's whole KV in the given form.
std::vector<uint8_t> PackLayer(PrefillEngine& engine, PrefillSequence& sequence, int layer,
                               const KvSelection& selection);

// Every block of every head.
KvSelection WholeLayer(const ModelConfig& config, int64_t num_tokens, int block_tokens,
                       kernels::KvOrder order, kernels::DType dtype);

// All layers, whose KV nobody takes: FinalLogits comes next and, if asked for, Logprobs.
std::unique_ptr<PrefillSequence> RunLayers(PrefillEngine& engine, absl::Span<const uint32_t> tokens,
                                           const AttentionOptions& options, bool logprobs);

// Prompts computed together.
std::vector<PromptRun> RunPrompts(PrefillEngine& engine,
                                  const std::vector<std::vector<uint32_t>>& prompts,
                                  const AttentionOptions& options);

// One prompt alone, without its log-probabilities.
PromptRun RunPrompt(PrefillEngine& engine, const std::vector<uint32_t>& tokens,
                    const AttentionOptions& options);

}  // namespace prefilld::model

#endif  // PREFILLD_TESTS_MODEL_PROMPT_RUN_H_
