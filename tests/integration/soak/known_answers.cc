#include "tests/integration/soak/known_answers.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "tests/model/prompt_run.h"

namespace prefilld::integration {
namespace {

constexpr int kFamilies = 5;        // of prompts that begin alike
constexpr int kCommonTokens = 512;  // at the beginning of each prompt of a family
constexpr int kLengths[] = {600, 750, 900, 1300};

// Returns the place of the first difference. Rounded elements are fp32.
std::optional<size_t> Difference(const std::string& own, const std::string& known, bool rounded) {
  if (own.size() != known.size()) return std::min(own.size(), known.size());
  for (size_t at = 0; at < own.size(); at += sizeof(float)) {
    if (std::memcmp(&own[at], &known[at], sizeof(float)) == 0) continue;
    float a = 0, b = 0;
    std::memcpy(&a, &own[at], sizeof a);
    std::memcpy(&b, &known[at], sizeof b);
    if (!rounded || !(std::abs(a - b) <= 1e-4F + 1e-3F * std::abs(b))) return at;
  }
  return std::nullopt;
}

size_t DtypeBytes(::prefill::v1::DType dtype) { return dtype == ::prefill::v1::DTYPE_FP32 ? 4 : 2; }

}  // namespace

absl::Status ArrivingCache::OnAccepted(const ::prefill::v1::Accepted& accepted) {
  const ::prefill::v1::KvLayout& layout = accepted.layout();
  num_blocks_ = layout.num_blocks();
  pair_bytes_ = 2 * size_t{layout.block_tokens()} * layout.num_heads() * layout.head_dim() *
                DtypeBytes(layout.dtype());
  bytes_.assign(layout.num_layers() * num_blocks_ * pair_bytes_, '\0');
  accepted_ = true;
  return absl::OkStatus();
}

absl::Status ArrivingCache::OnFrame(const wire::ReceivedFrame& frame) {
  std::vector<uint8_t> scratch;
  const uint8_t* payload = frame.payload.Contiguous(scratch);
  const size_t block_bytes = pair_bytes_ / 2;
  const size_t run_bytes = frame.num_blocks * block_bytes;  // of K, or of V
  char* layer = &bytes_[frame.layer * num_blocks_ * pair_bytes_];
  char* keys = layer + frame.first_block * block_bytes;
  std::memcpy(keys, payload, run_bytes);
  std::memcpy(keys + num_blocks_ * block_bytes, payload + run_bytes, run_bytes);
  absl::SleepFor(delay_);
  return absl::OkStatus();
}

KnownAnswers::KnownAnswers(const std::string& address, int64_t vocab_size) {
  const auto client = *client::PrefillClient::Create({.address = address});
  uint64_t seed = 0;
  for (int family = 0; family < kFamilies; ++family) {
    const std::vector<uint32_t> common = model::RandomTokens(kCommonTokens, vocab_size, ++seed);
    for (const int length : kLengths) {
      std::vector<uint32_t> prompt = model::RandomTokens(length, vocab_size, ++seed);
      std::copy(common.begin(), common.end(), prompt.begin());
      prompts_.push_back(std::move(prompt));
    }
  }
  for (size_t prompt = 0; prompt < prompts_.size(); ++prompt) {
    ArrivingCache cache;
    ::prefill::v1::PrefillRequest request = Request(prompt);
    request.mutable_prefix_cache()->set_bypass(true);
    const auto result = client->Prefill(request, cache, {.metadata = {{"x-tenant", "known"}}});
    if (!result.ok()) {
      std::fprintf(stderr, "no answer to compare with: %s\n", result.status().ToString().c_str());
      abort();
    }
    answers_.push_back({.bytes = cache.bytes(), .first_token = result->first_token().token_id()});
  }
}

::prefill::v1::PrefillRequest KnownAnswers::Request(size_t prompt) const {
  ::prefill::v1::PrefillRequest request;
  request.mutable_token_ids()->Assign(prompts_[prompt].begin(), prompts_[prompt].end());
  request.mutable_attention()->set_policy(::prefill::v1::ATTENTION_POLICY_DENSE);
  return request;
}

absl::Status KnownAnswers::Check(client::PrefillClient& client, const Ask& ask) const {
  ::prefill::v1::PrefillRequest request = Request(ask.prompt);
  request.set_num_lanes(ask.lanes);
  request.set_request_id(ask.id);
  request.mutable_prefix_cache()->set_bypass(ask.bypass_prefix_cache);
  ArrivingCache cache(ask.delay);
  const auto result = client.Prefill(request, cache,
                                     {.deadline = ask.deadline,
                                      .cancellation = ask.cancellation,
                                      .metadata = {{"x-tenant", ask.tenant}}});
  if (!result.ok()) return result.status();
  const Answer& answer = answers_[ask.prompt];
  compared_bytes_ += static_cast<int64_t>(cache.bytes().size());
  if (const auto byte = Difference(cache.bytes(), answer.bytes, result->cached_tokens() > 0)) {
    return absl::DataLossError(absl::StrCat("prompt ", ask.prompt, ": byte ", *byte, " of ",
                                            cache.bytes().size(), " differs; ",
                                            result->cached_tokens(), " tokens were cached"));
  }
  if (result->first_token().token_id() != answer.first_token) {
    return absl::DataLossError(absl::StrCat("prompt ", ask.prompt, ": another first token"));
  }
  return absl::OkStatus();
}

}  // namespace prefilld::integration
