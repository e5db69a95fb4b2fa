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
  const size_t bytes = 2 * selection.num_blocks * selection.block_tokens * selection.num_heads *
                       engine.info().config.head_dim * kernels::SizeOf(selection.dtype);
  DeviceBuffer staging = OrDie(engine.AllocateStaging(bytes));
  OrDie(sequence.PackKv(layer, selection, staging.data()));
  std::vector<uint8_t> packed(bytes);
  std::memcpy(packed.data(), staging.data(), bytes);
  return packed;
}

PromptRun RunPrompt(PrefillEngine& engine, const std::vector<uint32_t>& tokens,
                    const AttentionOptions& options) {
  const ModelConfig& config = engine.info().config;
  const int64_t num_tokens = static_cast<int64_t>(tokens.size());
  std::unique_ptr<PrefillSequence> sequence = OrDie(engine.Start(tokens, options));
  PromptRun run;
  for (int layer = 0; layer < config.num_layers; ++layer) {
    run.reports.push_back(OrDie(sequence->RunLayer()));
    const std::vector<uint8_t> packed = PackLayer(
        engine, *sequence, layer,
        WholeLayer(config, num_tokens, 128, kernels::KvOrder::kHnd, kernels::DType::kFp32));
    std::vector<float> kv(packed.size() / sizeof(float));
    std::memcpy(kv.data(), packed.data(), packed.size());
    run.kv.push_back(std::move(kv));
    sequence->ReleaseKv(layer);
  }
  run.logits = OrDie(sequence->FinalLogits());
  return run;
}

}  // namespace prefilld::model
