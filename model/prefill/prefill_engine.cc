#include "model/prefill/prefill_engine.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "model/prefill/engine_parts.h"
#include "model/prefill/packed_prompts.h"
#include "model/prefill/prompt_sequence.h"
#include "model/prefill/prompt_state.h"
#include "proto/status_macros.h"

namespace prefilld::model {
namespace {

class Engine final : public PrefillEngine {
 public:
  explicit Engine(std::unique_ptr<EngineParts> parts) : parts_(std::move(parts)) {}

  const EngineInfo& info() const override { return parts_->info; }
  int kv_slots() const override { return parts_->kv_slots; }
  size_t allocated_bytes() const override { return parts_->device->allocated_bytes(); }
  int64_t num_recordings() const override { return parts_->device->num_recordings(); }
  ResidentTokens resident_tokens() const override { return parts_->states.resident_tokens(); }
  absl::StatusOr<DeviceBuffer> AllocateStaging(size_t bytes) override {
    return parts_->device->AllocateStaging(bytes);
  }
  absl::StatusOr<DeviceBuffer> AdoptStaging(void* data, size_t bytes) override {
    return parts_->device->AdoptStaging(data, bytes);
  }
  PrefixCacheUse prefix_cache() const override {
    if (parts_->prefixes == nullptr) return {};
    return {.counts = parts_->prefixes->index().counts(),
            .block_bytes = parts_->prefixes->block_bytes(),
            .load_seconds = parts_->device->host_copies().load_seconds()};
  }
  const PrefixCache* prefix_index() const override {
    return parts_->prefixes == nullptr ? nullptr : &parts_->prefixes->index();
  }
  int64_t CachedTokens(const PromptInput& prompt) const override {
    if (!UsesPrefixes(prompt)) return 0;
    return parts_->prefixes->index().CountUsable(PrefixQueryOf(prompt));
  }

  int64_t max_batch_tokens() const override { return parts_->max_batch_tokens; }
  int64_t BatchTokens(int64_t num_tokens, const AttentionOptions& options) const override {
    const int64_t padded = PackedPrompts::PaddedTokens(num_tokens);
    const bool fits = kFullBatchPrompts * padded <= parts_->max_batch_tokens &&
                      Resolve(options, num_tokens) == AttentionPolicy::kDense &&
                      HasCommonRopeTable(parts_->info.config, num_tokens);
    return fits ? padded : 0;
  }

  bool MayInterject(int64_t num_tokens, const AttentionOptions& options) const override {
    return parts_->MayInterject(PackedPrompts::PaddedTokens(num_tokens),
                                Resolve(options, num_tokens));
  }

  bool CanStart(int64_t num_tokens) const override { return parts_->states.CanTake(num_tokens); }

  absl::StatusOr<std::unique_ptr<PrefillSequence>> Start(
      absl::Span<const PromptInput> prompts) override {
    std::vector<absl::Span<const uint32_t>> tokens;
    int64_t padded_tokens = 0;
    bool logprobs = false;
    for (const PromptInput& prompt : prompts) {
      PREFILLD_RETURN_IF_ERROR(CheckPrompt(prompt));
      tokens.push_back(prompt.tokens);
      padded_tokens += PackedPrompts::PaddedTokens(static_cast<int64_t>(prompt.tokens.size()));
      logprobs |= prompt.logprobs;
    }
    PREFILLD_RETURN_IF_ERROR(CheckBatch(prompts));
    AttentionOptions resolved = prompts.front().attention;
    resolved.policy = Resolve(resolved, static_cast<int64_t>(tokens.front().size()));
    // Padding the last prompt keeps the number of recorded lengths small.
    const bool pad_last =
        resolved.policy == AttentionPolicy::kDense && padded_tokens <= parts_->max_graph_tokens;
    PackedPrompts packed(tokens, pad_last);
    PREFILLD_ASSIGN_OR_RETURN(PromptState * state,
                              parts_->states.Take(static_cast<int64_t>(packed.tokens().size())));
    PrefixLease lease;
    if (prompts.size() == 1) lease = LookUp(prompts.front(), resolved, packed);
    state->Start(std::move(packed), resolved, logprobs, std::move(lease));
    return std::make_unique<PromptSequence>(parts_.get(), state);
  }

 private:
  AttentionPolicy Resolve(const AttentionOptions& options, int64_t num_tokens) const {
    return ResolvePolicy(options, num_tokens, parts_->block_tokens);
  }

  bool UsesPrefixes(const PromptInput& prompt) const {
    return parts_->prefixes != nullptr && prompt.use_prefix_cache && !prompt.logprobs &&
           prompt.attention.recall_audit_rows == 0 && !IsBaseline(prompt.attention.policy);
  }

  PrefixQuery PrefixQueryOf(const PromptInput& prompt) const {
    const auto num_tokens = static_cast<int64_t>(prompt.tokens.size());
    const bool common = HasCommonRopeTable(parts_->info.config, num_tokens);
    AttentionOptions attention = prompt.attention;
    attention.policy = Resolve(attention, num_tokens);
    return {PrefixDomain(parts_->info.fingerprint, common ? 0 : num_tokens, prompt.cache_salt),
            prompt.tokens, attention, /*is_private=*/!prompt.cache_salt.empty()};
  }

  // Asks the prefix cache. A few queries behind a prefix are computed densely, as short prompts
  // are: all that a pattern could leave out costs little. Their prompt is not padded, because it is
  // not recorded.
  PrefixLease LookUp(const PromptInput& prompt, AttentionOptions& attention,
                     PackedPrompts& packed) const {
    if (!UsesPrefixes(prompt)) return {};
    PrefixLease lease = parts_->prefixes->index().Take(PrefixQueryOf(prompt));
    if (lease.found_tokens() == 0) return lease;
    packed = PackedPrompts({prompt.tokens}, /*pad_last=*/false);
    const auto computed = static_cast<int64_t>(prompt.tokens.size()) - lease.found_tokens();
    if (computed <= 2 * parts_->block_tokens) attention.policy = AttentionPolicy::kDense;
    return lease;
  }

  absl::Status CheckPrompt(const PromptInput& prompt) const {
    PREFILLD_RETURN_IF_ERROR(CheckTokens(prompt.tokens));
    PREFILLD_RETURN_IF_ERROR(Validate(prompt.attention));
    if (!IsBaseline(prompt.attention.policy) || parts_->baseline != nullptr) {
      return absl::OkStatus();
    }
    return absl::InvalidArgumentError(absl::StrCat("attention.policy ",
                                                   Name(prompt.attention.policy),
                                                   " is a baseline; this engine has none"));
  }

  absl::Status CheckBatch(absl::Span<const PromptInput> prompts) const {
    if (prompts.empty()) return absl::InvalidArgumentError("a batch of no prompts");
    if (prompts.size() == 1) return absl::OkStatus();
    int64_t sum = 0;
    for (const PromptInput& prompt : prompts) {
      const auto num_tokens = static_cast<int64_t>(prompt.tokens.size());
      const int64_t taken = BatchTokens(num_tokens, prompt.attention);
      if (taken == 0) {
        return absl::InvalidArgumentError(
            absl::StrCat("a prompt of ", num_tokens, " tokens with attention.policy ",
                         Name(prompt.attention.policy), " runs alone, not in a batch"));
      }
      sum += taken;
    }
    if (sum <= parts_->max_batch_tokens) return absl::OkStatus();
    return absl::InvalidArgumentError(absl::StrCat("a batch of ", sum, " tokens; at most ",
                                                   parts_->max_batch_tokens, ", padding included"));
  }

  absl::Status CheckTokens(absl::Span<const uint32_t> tokens) const {
    const int64_t vocab_size = parts_->info.config.vocab_size;
    if (tokens.empty() || static_cast<int64_t>(tokens.size()) > parts_->info.max_tokens) {
      return absl::InvalidArgumentError(absl::StrCat(
          "a prompt of ", tokens.size(), " tokens is outside [1, ", parts_->info.max_tokens, "]"));
    }
    for (size_t i = 0; i < tokens.size(); ++i) {
      if (tokens[i] < vocab_size) continue;
      return absl::InvalidArgumentError(absl::StrCat("token_ids[", i, "] ", tokens[i],
                                                     " is outside the vocabulary of ", vocab_size));
    }
    return absl::OkStatus();
  }

  const std::unique_ptr<EngineParts> parts_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<PrefillEngine>> CreatePrefillEngine(const EngineOptions& options) {
  PREFILLD_ASSIGN_OR_RETURN(auto parts, CreateEngineParts(options));
  return std::make_unique<Engine>(std::move(parts));
}

}  // namespace prefilld::model
