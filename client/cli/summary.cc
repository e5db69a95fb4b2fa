#include "client/cli/summary.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "nlohmann/json.hpp"
#include "proto/wire/enum_names.h"
#include "proto/wire/grpc_status.h"

namespace prefilld::client {
namespace {

using ::nlohmann::json;
using ::prefill::v1::AttentionPolicy;
using ::prefill::v1::GenerateResult;
using ::prefill::v1::LayerStats;
using ::prefill::v1::PrefillResult;
using ::prefill::v1::RecallAudit;
using ::prefill::v1::RecallSummary;
using ::prefill::v1::ServerInfo;
using wire::EnumName;

const char* EndedBy(::prefill::v1::FinishReason reason) {
  switch (reason) {
    case ::prefill::v1::FINISH_REASON_STOP:
      return "an end token";
    case ::prefill::v1::FINISH_REASON_LENGTH:
      return "max_new_tokens";
    case ::prefill::v1::FINISH_REASON_POSITIONS:
      return "the model's last position (max_position_embeddings)";
    default:
      return "a reason that this program does not know";
  }
}

double PerSecond(uint64_t amount, uint64_t microseconds) {
  return microseconds == 0 ? 0.0 : 1e6 * static_cast<double>(amount) / microseconds;
}

std::string Line(const char* label, const std::string& text) {
  return absl::StrFormat("%-10s %s\n", label, text);
}

std::string PromptLine(const PrefillResult& prefill, uint64_t ttft_us) {
  const std::string cached =
      prefill.cached_tokens() == 0
          ? ""
          : absl::StrFormat(", %s of them cached", CountText(prefill.cached_tokens()));
  return Line(
      "prompt",
      absl::StrFormat("%s tokens%s; first token after %s, %s tokens/s; computing %s, queued %s",
                      CountText(prefill.num_tokens()), cached, DurationText(ttft_us),
                      CountText(PerSecond(prefill.num_tokens(), ttft_us)),
                      DurationText(prefill.compute_us()), DurationText(prefill.queue_us())));
}

std::string AttentionLine(const PrefillResult& prefill) {
  const LayerStats& total = prefill.total();
  return Line(
      "attention",
      absl::StrFormat("%s, density %.1f %%; heads: %u dense, %u pivot, %u shared, %u scored, "
                      "%u score-sharing, %u vertical-slash%s; attention %s, patterns %s",
                      EnumName(prefill.policy()), 100 * total.density(), total.dense_heads(),
                      total.pivot_heads(), total.shared_heads(), total.scored_heads(),
                      total.score_sharing_heads(), total.vertical_slash_heads(),
                      total.baseline_heads() == 0
                          ? ""
                          : absl::StrFormat(", %u baseline", total.baseline_heads()),
                      DurationText(total.attention_us()), DurationText(total.pattern_us())));
}

std::string RecallText(const char* kind, const RecallSummary& heads) {
  if (heads.heads().empty()) return "";
  return Line("recall",
              absl::StrFormat("%s: mean %.3f, 5th percentile %.3f, lowest %.3f (layer %u, head %u)",
                              kind, heads.mean(), heads.fifth_percentile(), heads.lowest(),
                              heads.lowest_layer(), heads.lowest_head()));
}

std::string RecallLines(const PrefillResult& prefill) {
  const RecallAudit& audit = prefill.total().recall();
  return absl::StrCat(RecallText("shared", audit.shared()), RecallText("scored", audit.scored()),
                      RecallText("vertical-slash", audit.vertical_slash()),
                      RecallText("baseline", audit.baseline()));
}

std::string LikelihoodLine(const PrefillResult& prefill) {
  const int count = prefill.prompt_logprobs_size();
  if (count == 0) return "";
  double sum = 0.0;
  int likeliest = 0;
  for (int i = 0; i < count; ++i) {
    sum += prefill.prompt_logprobs(i);
    if (prefill.prompt_logprobs(i) == prefill.best_logprobs(i)) ++likeliest;
  }
  return Line("likelihood",
              absl::StrFormat("perplexity %.4g over %s tokens; %.1f %% are the likeliest",
                              std::exp(-sum / count), CountText(count), 100.0 * likeliest / count));
}

// Frames that were packed before the memory was attached come over gRPC.
const char* TransportText(const PrefillResult& prefill) {
  if (prefill.shared_memory_bytes() == 0) return "";
  return prefill.shared_memory_bytes() < prefill.kv_bytes() ? ", some in shared memory,"
                                                            : " in shared memory";
}

// The transfer lasts about as long as the compute that hides it, and that sets its rate.
std::string KvLine(const PrefillResult& prefill, uint64_t transfer_us, double overlap,
                   uint64_t first_frame_us, uint32_t layers_computed, uint32_t num_layers) {
  if (prefill.kv_bytes() == 0) return Line("KV", "none");
  if (first_frame_us == 0) {  // no frame came here, where times are taken
    return Line("KV", absl::StrFormat("%s in %s frames, pushed", BytesText(prefill.kv_bytes()),
                                      CountText(prefill.kv_frames())));
  }
  return Line(
      "KV",
      absl::StrFormat("%s in %s frames%s within %s (%s/s); %.0f %% left before the last layer was "
                      "done; layer 0 here after %s, with %u of %u layers computed",
                      BytesText(prefill.kv_bytes()), CountText(prefill.kv_frames()),
                      TransportText(prefill), DurationText(transfer_us),
                      BytesText(PerSecond(prefill.kv_bytes(), transfer_us)), 100 * overlap,
                      DurationText(first_frame_us), layers_computed, num_layers));
}

std::string LowestRecallText(const LayerStats& layer) {
  if (!layer.has_recall()) return "";
  double lowest = 1;
  const RecallAudit& audit = layer.recall();
  for (const RecallSummary* heads :
       {&audit.shared(), &audit.scored(), &audit.vertical_slash(), &audit.baseline()}) {
    if (!heads->heads().empty()) lowest = std::min(lowest, heads->lowest());
  }
  return absl::StrFormat("%15.3f", lowest);
}

std::string LayerTable(const PrefillResult& prefill) {
  if (prefill.layers().empty()) return "";
  std::string text = absl::StrFormat(
      "%5s %8s %6s %6s %6s %6s %6s %6s %9s %10s %10s %10s%s\n", "layer", "queries", "dense",
      "pivot", "shared", "scored", "sc-shr", "v-slsh", "density", "compute", "attention",
      "patterns", prefill.total().has_recall() ? "  lowest recall" : "");
  for (const LayerStats& layer : prefill.layers()) {
    absl::StrAppendFormat(
        &text, "%5u %8u %6u %6u %6u %6u %6u %6u %8.1f%% %10s %10s %10s%s\n", layer.layer(),
        layer.num_queries(), layer.dense_heads(), layer.pivot_heads(), layer.shared_heads(),
        layer.scored_heads(), layer.score_sharing_heads(), layer.vertical_slash_heads(),
        100 * layer.density(), DurationText(layer.compute_us()), DurationText(layer.attention_us()),
        DurationText(layer.pattern_us()), LowestRecallText(layer));
  }
  return text;
}

json ToJson(const RecallSummary& heads) {
  return {{"mean", heads.mean()},
          {"fifth_percentile", heads.fifth_percentile()},
          {"lowest", heads.lowest()},
          {"lowest_layer", heads.lowest_layer()},
          {"lowest_head", heads.lowest_head()},
          {"heads", std::vector<float>(heads.heads().begin(), heads.heads().end())}};
}

json ToJson(const RecallAudit& audit) {
  json object = {{"audit_us", audit.audit_us()}};
  if (audit.has_shared()) object["shared"] = ToJson(audit.shared());
  if (audit.has_scored()) object["scored"] = ToJson(audit.scored());
  if (audit.has_vertical_slash()) object["vertical_slash"] = ToJson(audit.vertical_slash());
  if (audit.has_baseline()) object["baseline"] = ToJson(audit.baseline());
  return object;
}

json ToJson(const LayerStats& stats) {
  json object = {{"dense_heads", stats.dense_heads()},
                 {"pivot_heads", stats.pivot_heads()},
                 {"shared_heads", stats.shared_heads()},
                 {"scored_heads", stats.scored_heads()},
                 {"score_sharing_heads", stats.score_sharing_heads()},
                 {"vertical_slash_heads", stats.vertical_slash_heads()},
                 {"baseline_heads", stats.baseline_heads()},
                 {"num_queries", stats.num_queries()},
                 {"density", stats.density()},
                 {"compute_us", stats.compute_us()},
                 {"attention_us", stats.attention_us()},
                 {"pattern_us", stats.pattern_us()}};
  if (stats.has_recall()) object["recall"] = ToJson(stats.recall());
  return object;
}

json ToJson(const PrefillResult& result) {
  json object = ToJson(result.total());
  // This covers the whole request up to its first token and replaces the sum of the layers' times.
  object["compute_us"] = result.compute_us();
  object["queue_us"] = result.queue_us();
  object["stall_us"] = result.stall_us();
  object["policy"] = EnumName(result.policy());
  object["batch_prompts"] = result.batch_prompts();
  object["prompt_tokens"] = result.num_tokens();
  object["cached_tokens"] = result.cached_tokens();
  object["kv_bytes"] = result.kv_bytes();
  object["shared_memory_bytes"] = result.shared_memory_bytes();
  object["kv_frames"] = result.kv_frames();
  for (const LayerStats& layer : result.layers()) {
    object["layers"].push_back(ToJson(layer));
    object["layers"].back()["layer"] = layer.layer();
  }
  if (result.prompt_logprobs_size() > 0) {
    object["prompt_logprobs"] = result.prompt_logprobs();
    object["best_logprobs"] = result.best_logprobs();
    object["logprobs_us"] = result.logprobs_us();
  }
  return object;
}

json ToJson(const ::prefill::v1::SampledToken& token) {
  json object = {{"token_id", token.token_id()}, {"logprob", token.logprob()}};
  for (const auto& entry : token.top_logprobs()) {
    object["top_logprobs"].push_back(
        {{"token_id", entry.token_id()}, {"logprob", entry.logprob()}});
  }
  return object;
}

}  // namespace

std::string Summary(const Generated& generated) {
  const GenerateResult& result = generated.result;
  const PrefillResult& prefill = result.prefill();
  // The first token is computed by the prefill, not by a step.
  const uint64_t steps = result.num_tokens() - 1;
  return absl::StrCat(
      PromptLine(prefill, result.ttft_us()), AttentionLine(prefill), RecallLines(prefill),
      KvLine(prefill, result.kv_transfer_us(), result.kv_overlap(), result.first_frame_us(),
             result.layers_computed_at_first_frame(), generated.num_layers),
      Line("generated",
           absl::StrFormat("%u tokens, %.1f tokens/s, ended by %s", result.num_tokens(),
                           PerSecond(steps, result.decode_us()), EndedBy(result.finish_reason()))));
}

std::string Summary(const PrefillResult& result, const TransferTimes& times) {
  return absl::StrCat(
      PromptLine(result, times.total_us), AttentionLine(result), RecallLines(result),
      LikelihoodLine(result),
      KvLine(result, times.last_frame_us - times.first_frame_us, times.overlap,
             times.first_frame_us, times.layers_computed_at_first_frame, times.num_layers),
      LayerTable(result));
}

std::string Summary(const ServerInfo& info) {
  std::string allowed;
  for (int policy : info.allowed_policies()) {
    absl::StrAppend(&allowed, allowed.empty() ? "" : ", ",
                    EnumName(static_cast<AttentionPolicy>(policy)));
  }
  return absl::StrCat(
      Line("model",
           absl::StrFormat("%s, fingerprint %s", info.model_name(), info.model_fingerprint())),
      Line("", absl::StrFormat("%u layers, %u heads, %u KV heads of %u, vocabulary %s",
                               info.num_layers(), info.num_heads(), info.num_kv_heads(),
                               info.head_dim(), CountText(info.vocab_size()))),
      Line("device",
           absl::StrFormat("%s, computes in %s", info.device(), EnumName(info.native_dtype()))),
      Line("accepts", absl::StrFormat("up to %s tokens, %u lanes",
                                      CountText(info.max_prompt_tokens()), info.max_lanes())),
      Line("attention", absl::StrFormat("%s by default, allowed: %s; auto shares from %s tokens on",
                                        EnumName(info.default_policy()), allowed,
                                        CountText(info.crossover_tokens()))),
      Line("load", absl::StrFormat("%u running, %u of %u queued, %s tokens waiting",
                                   info.running_requests(), info.queued_requests(),
                                   info.queue_capacity(), CountText(info.queued_tokens()))),
      info.has_prefix_cache()
          ? Line("prefixes", absl::StrFormat("%s of %s used, blocks of %u tokens",
                                             BytesText(info.prefix_cache().used_bytes()),
                                             BytesText(info.prefix_cache().capacity_bytes()),
                                             info.prefix_cache().block_tokens()))
          : "",
      Line("version", info.version()));
}

json ToJson(const Generated& generated) {
  const GenerateResult& result = generated.result;
  json object = {{"request_id", generated.request_id},
                 {"text", generated.text},
                 {"finish_reason", EnumName(result.finish_reason())},
                 {"ttft_us", result.ttft_us()},
                 {"decode_us", result.decode_us()},
                 {"kv_transfer_us", result.kv_transfer_us()},
                 {"kv_overlap", result.kv_overlap()},
                 {"first_frame_us", result.first_frame_us()},
                 {"layers_computed_at_first_frame", result.layers_computed_at_first_frame()},
                 {"prefill", ToJson(result.prefill())}};
  object["token_ids"] = json::array();
  object["tokens"] = json::array();
  for (const auto& token : generated.tokens) {
    object["token_ids"].push_back(token.token_id());
    object["tokens"].push_back(ToJson(token));
  }
  return object;
}

json ToJson(const PrefillResult& result, const TransferTimes& times) {
  json object = {{"total_us", times.total_us},
                 {"first_frame_us", times.first_frame_us},
                 {"last_frame_us", times.last_frame_us},
                 {"layers_computed_at_first_frame", times.layers_computed_at_first_frame},
                 {"kv_overlap", times.overlap},
                 {"first_token", ToJson(result.first_token())},
                 {"prefill", ToJson(result)}};
  return object;
}

json ToJson(const ServerInfo& info) {
  json object = {{"version", info.version()},
                 {"model_name", info.model_name()},
                 {"model_fingerprint", info.model_fingerprint()},
                 {"device", info.device()},
                 {"native_dtype", EnumName(info.native_dtype())},
                 {"vocab_size", info.vocab_size()},
                 {"num_layers", info.num_layers()},
                 {"num_heads", info.num_heads()},
                 {"num_kv_heads", info.num_kv_heads()},
                 {"head_dim", info.head_dim()},
                 {"max_prompt_tokens", info.max_prompt_tokens()},
                 {"max_lanes", info.max_lanes()},
                 {"default_policy", EnumName(info.default_policy())},
                 {"crossover_tokens", info.crossover_tokens()},
                 {"queue_capacity", info.queue_capacity()},
                 {"queued_requests", info.queued_requests()},
                 {"running_requests", info.running_requests()},
                 {"queued_tokens", info.queued_tokens()}};
  if (info.has_prefix_cache()) {
    object["prefix_cache"] = {{"block_tokens", info.prefix_cache().block_tokens()},
                              {"capacity_bytes", info.prefix_cache().capacity_bytes()},
                              {"used_bytes", info.prefix_cache().used_bytes()}};
  }
  for (int policy : info.allowed_policies()) {
    object["allowed_policies"].push_back(EnumName(static_cast<AttentionPolicy>(policy)));
  }
  object["eos_token_ids"] =
      json(std::vector<uint32_t>(info.eos_token_ids().begin(), info.eos_token_ids().end()));
  return object;
}

std::string ErrorText(const absl::Status& status, const std::string& address) {
  std::string text = absl::StrCat(absl::StatusCodeToString(status.code()), ": ", status.message());
  if (absl::IsUnavailable(status)) absl::StrAppend(&text, " (", address, ")");
  if (const auto delay = wire::RetryDelay(status)) {
    absl::StrAppend(&text, "; try again in ", absl::FormatDuration(*delay));
  }
  return text;
}

std::string BytesText(uint64_t bytes) {
  const double value = static_cast<double>(bytes);
  if (bytes >= 1'000'000'000) return absl::StrFormat("%.2f GB", 1e-9 * value);
  if (bytes >= 1'000'000) return absl::StrFormat("%.1f MB", 1e-6 * value);
  if (bytes >= 1000) return absl::StrFormat("%.1f kB", 1e-3 * value);
  return absl::StrCat(bytes, " B");
}

std::string CountText(uint64_t count) {
  std::string text = absl::StrCat(count);
  for (int i = static_cast<int>(text.size()) - 3; i > 0; i -= 3) text.insert(i, 1, ',');
  return text;
}

std::string DurationText(uint64_t microseconds) {
  if (microseconds < 10'000) return absl::StrFormat("%.2f ms", 1e-3 * microseconds);
  if (microseconds < 1'000'000) return absl::StrFormat("%.0f ms", 1e-3 * microseconds);
  return absl::StrFormat("%.2f s", 1e-6 * microseconds);
}

}  // namespace prefilld::client
