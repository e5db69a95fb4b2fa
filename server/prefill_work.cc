#include "server/prefill_work.h"

#include <algorithm>
#include <random>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "proto/status_macros.h"
#include "proto/wire/address_pattern.h"
#include "proto/wire/grpc_status.h"
#include "proto/wire/host_port.h"
#include "proto/wire/kv_layout.h"
#include "proto/wire/lane_count.h"
#include "proto/wire/request_id.h"
#include "server/fair_shares.h"
#include "server/refusal_cause.h"

namespace prefilld::server {
namespace {

namespace v1 = ::prefill::v1;

constexpr size_t kMaxAddressLength = 256;
constexpr uint32_t kMaxReceivers = 16;
constexpr size_t kMinKeyLength = 32;

// Comes from the operating system's random source, because it keeps strangers out.
std::string NewKey() {
  std::random_device random;
  std::string key;
  for (int i = 0; i < 4; ++i) absl::StrAppend(&key, absl::Hex(random(), absl::kZeroPad8));
  return key;
}

std::string NewRequestId() {
  static thread_local std::mt19937_64 random{std::random_device{}()};
  return absl::StrFormat("%016x", random());
}

absl::Status CheckTokens(const v1::PrefillRequest& request, const model::EngineInfo& engine) {
  if (request.token_ids().empty()) {
    return absl::InvalidArgumentError("token_ids is empty; at least 1 token");
  }
  if (request.token_ids_size() > engine.max_tokens) {
    return absl::InvalidArgumentError(absl::StrCat("token_ids has ", request.token_ids_size(),
                                                   " tokens; at most ", engine.max_tokens));
  }
  const auto outside = std::find_if(
      request.token_ids().begin(), request.token_ids().end(),
      [&engine](uint32_t id) { return id >= static_cast<uint64_t>(engine.config.vocab_size); });
  if (outside != request.token_ids().end()) {
    return absl::InvalidArgumentError(
        absl::StrCat("token_ids[", outside - request.token_ids().begin(), "] is ", *outside,
                     "; ids are below vocab_size ", engine.config.vocab_size));
  }
  return absl::OkStatus();
}

absl::StatusOr<v1::KvScales> ResolveScales(v1::KvScales request, v1::DType dtype) {
  if (!v1::KvScales_IsValid(request)) {
    return absl::InvalidArgumentError(absl::StrCat("layout.scales ", static_cast<int>(request),
                                                   " unknown; one of ", wire::kKvScalesList));
  }
  if (wire::HasScales(dtype)) {
    return request == v1::KV_SCALES_UNSPECIFIED ? v1::KV_SCALES_PER_TOKEN : request;
  }
  if (request == v1::KV_SCALES_UNSPECIFIED) return request;
  return absl::InvalidArgumentError(absl::StrCat("layout.scales ", v1::KvScales_Name(request),
                                                 " with layout.dtype ", v1::DType_Name(dtype),
                                                 ", which has none; allowed with DTYPE_FP8_E4M3"));
}

absl::StatusOr<v1::KvLayout> ResolveLayout(const v1::KvLayoutRequest& request, int64_t num_tokens,
                                           const model::EngineInfo& engine) {
  v1::KvLayout layout;
  layout.set_model_fingerprint(engine.fingerprint);
  layout.set_num_layers(engine.config.num_layers);
  layout.set_num_kv_heads(engine.config.num_kv_heads);
  layout.set_head_dim(engine.config.head_dim);
  layout.set_keys_rotated(true);
  layout.set_num_tokens(num_tokens);

  const uint32_t block_tokens =
      request.block_tokens() == 0 ? wire::kDefaultBlockTokens : request.block_tokens();
  if (!wire::IsBlockTokens(block_tokens)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "layout.block_tokens ", block_tokens, " unsupported; one of ", wire::kBlockTokensList));
  }
  layout.set_block_tokens(block_tokens);
  layout.set_num_blocks((num_tokens + block_tokens - 1) / block_tokens);

  layout.set_order(request.order() == v1::KV_ORDER_UNSPECIFIED ? v1::KV_ORDER_NHD
                                                               : request.order());
  if (!wire::IsKvOrder(layout.order())) {
    return absl::InvalidArgumentError(absl::StrCat("layout.order ",
                                                   static_cast<int>(request.order()),
                                                   " unknown; one of ", wire::kKvOrdersList));
  }
  if (!v1::DType_IsValid(request.dtype())) {
    return absl::InvalidArgumentError(absl::StrCat("layout.dtype ",
                                                   static_cast<int>(request.dtype()),
                                                   " unknown; one of ", wire::kKvDTypesList));
  }
  layout.set_dtype(request.dtype() == v1::DTYPE_UNSPECIFIED ? ToProto(engine.native_dtype)
                                                            : request.dtype());
  PREFILLD_ASSIGN_OR_RETURN(const v1::KvScales scales,
                            ResolveScales(request.scales(), layout.dtype()));
  layout.set_scales(scales);

  const uint32_t num_kv_heads = engine.config.num_kv_heads;
  if (request.first_head() >= num_kv_heads) {
    return absl::InvalidArgumentError(absl::StrCat("layout.first_head ", request.first_head(),
                                                   "; the model has ", num_kv_heads, " KV heads"));
  }
  const uint32_t heads_left = num_kv_heads - request.first_head();
  if (request.num_heads() > heads_left) {
    return absl::InvalidArgumentError(
        absl::StrCat("layout.num_heads ", request.num_heads(), " from head ", request.first_head(),
                     " on; the model has ", num_kv_heads, " KV heads"));
  }
  layout.set_first_head(request.first_head());
  layout.set_num_heads(request.num_heads() == 0 ? heads_left : request.num_heads());

  if (request.first_block() > layout.num_blocks()) {
    return absl::InvalidArgumentError(absl::StrCat("layout.first_block ", request.first_block(),
                                                   "; the prompt has ", layout.num_blocks(),
                                                   " blocks"));
  }
  layout.set_first_block(request.first_block());
  return layout;
}

absl::StatusOr<model::SamplingOptions> ResolveSampling(const v1::Sampling& request) {
  const model::SamplingOptions options{.temperature = request.temperature(),
                                       .top_k = request.top_k(),
                                       .top_p = request.top_p(),
                                       .seed = request.seed(),
                                       .top_logprobs = request.top_logprobs()};
  PREFILLD_RETURN_IF_ERROR(model::Validate(options));
  return options;
}

absl::Status CheckLogprobs(const v1::PrefillRequest& request) {
  if (!request.prompt_logprobs() || request.token_ids_size() <= kMaxPromptLogprobsTokens) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(absl::StrCat("prompt_logprobs with ", request.token_ids_size(),
                                                 " token_ids; at most ", kMaxPromptLogprobsTokens));
}

absl::Status CheckLanes(uint32_t num_lanes, const RequestLimits& limits) {
  if (num_lanes > static_cast<uint32_t>(limits.max_lanes)) {
    return absl::InvalidArgumentError(
        absl::StrCat("num_lanes ", num_lanes, "; at most ", limits.max_lanes));
  }
  return absl::OkStatus();
}

// Fills in what a push has that no other delivery has. `num_lanes` is what was asked for.
void ResolvePush(uint32_t num_lanes, const RequestLimits& limits, PrefillWork& work) {
  const int64_t kv_bytes =
      work.num_sent_blocks() * work.layout.num_layers() * wire::KvPairBytes(work.layout);
  work.lanes_are_chosen = num_lanes == 0;
  work.num_lanes = static_cast<int>(num_lanes);
  if (work.lanes_are_chosen) {
    work.num_lanes = std::min(static_cast<int>(wire::ChooseLanes(kv_bytes)), limits.max_lanes);
  }
  work.transfer_key = NewKey();
  work.resume_window = limits.resume_window;
}

absl::Status CheckFingerprint(const std::string& wanted, const model::EngineInfo& engine) {
  if (wanted.empty() || wanted == engine.fingerprint) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrCat("model_fingerprint ",
                                                    absl::CHexEscape(wanted.substr(0, 64)),
                                                    "; this server runs ", engine.fingerprint));
}

absl::Status CheckReceivers(const v1::PrefillRequest& request) {
  if (request.num_receivers() > kMaxReceivers) {
    return absl::InvalidArgumentError(
        absl::StrCat("num_receivers ", request.num_receivers(), "; at most ", kMaxReceivers));
  }
  if (request.receiver_key().empty()) return absl::OkStatus();
  if (request.num_receivers() < 2) {
    return absl::InvalidArgumentError(
        absl::StrCat("receiver_key with num_receivers ", request.num_receivers(), "; 2 at least"));
  }
  if (request.receiver_key().size() < kMinKeyLength) {
    return absl::InvalidArgumentError(absl::StrCat("receiver_key has ",
                                                   request.receiver_key().size(),
                                                   " characters; at least ", kMinKeyLength));
  }
  return wire::CheckId("receiver_key", request.receiver_key());
}

// An operator who wants no request to be resumed leaves the key out of account, and Accepted says
// so.
absl::Status ResolveResumption(const std::string& request_id, const std::string& resume_key,
                               const RequestLimits& limits, PrefillWork& work) {
  if (resume_key.empty()) return absl::OkStatus();
  if (resume_key.size() < kMinKeyLength) {
    return absl::InvalidArgumentError(absl::StrCat("resume_key has ", resume_key.size(),
                                                   " characters; at least ", kMinKeyLength));
  }
  PREFILLD_RETURN_IF_ERROR(wire::CheckId("resume_key", resume_key));
  if (request_id.empty()) {
    return absl::InvalidArgumentError("request_id is empty; with resume_key it is needed");
  }
  if (limits.resume_window <= absl::ZeroDuration()) return absl::OkStatus();
  work.resume_key = resume_key;
  work.resume_window = limits.resume_window;
  return absl::OkStatus();
}

absl::Status CheckPriority(const v1::PrefillRequest& request) {
  if (request.priority() >= -kMaxPriority && request.priority() <= kMaxPriority) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(absl::StrCat("priority ", request.priority(), "; from ",
                                                 -kMaxPriority, " to ", kMaxPriority));
}

// `field` is the name of this receiver in the request.
absl::Status CheckTarget(const std::string& field, const v1::DeliverTo& target,
                         const RequestLimits& limits) {
  const std::string& address = target.address();
  const std::string address_field = absl::StrCat(field, ".address");
  const std::string id_field = absl::StrCat(field, ".transfer_id");
  if (limits.deliver_to_allow.empty()) {
    return Because(RefusalCause::kPushTarget,
                   absl::UnimplementedError(absl::StrCat(field, ": this server pushes to nobody")));
  }
  if (address.size() > kMaxAddressLength) {
    return absl::InvalidArgumentError(absl::StrCat(address_field, " has ", address.size(),
                                                   " characters; at most ", kMaxAddressLength));
  }
  if (auto problem = wire::DialAddressProblem(address_field, address)) {
    return absl::InvalidArgumentError(*problem);
  }
  const bool allowed = std::any_of(
      limits.deliver_to_allow.begin(), limits.deliver_to_allow.end(),
      [&](const std::string& pattern) { return wire::AddressMatches(pattern, address); });
  if (!allowed) {
    return Because(RefusalCause::kPushTarget,
                   absl::PermissionDeniedError(absl::StrCat(
                       address_field, " ", address, " is not on this server's allow-list")));
  }
  if (target.transfer_id().empty()) {
    return absl::InvalidArgumentError(absl::StrCat(id_field, " is empty"));
  }
  return wire::CheckId(id_field, target.transfer_id());
}

absl::Status CheckDelivery(const v1::PrefillRequest& request, const RequestLimits& limits) {
  if (!request.has_deliver_to() && request.pushes().empty()) return absl::OkStatus();
  const char* const delivery = request.has_deliver_to() ? "deliver_to" : "pushes";
  if (request.num_receivers() > 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("num_receivers ", request.num_receivers(), "; with ", delivery, " at most 1"));
  }
  if (request.num_lanes() > 1 && !request.has_deliver_to()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "num_lanes ", request.num_lanes(), "; with pushes, which have their own, at most 1"));
  }
  if (request.has_deliver_to()) {
    if (!request.pushes().empty()) {
      return absl::InvalidArgumentError("deliver_to and pushes; one of them at most");
    }
    return CheckTarget("deliver_to", request.deliver_to(), limits);
  }
  if (request.pushes_size() > static_cast<int>(kMaxReceivers)) {
    return absl::InvalidArgumentError(
        absl::StrCat("pushes has ", request.pushes_size(), "; at most ", kMaxReceivers));
  }
  for (int i = 0; i < request.pushes_size(); ++i) {
    PREFILLD_RETURN_IF_ERROR(CheckTarget(absl::StrCat("pushes[", i, "].deliver_to"),
                                         request.pushes(i).deliver_to(), limits));
  }
  return absl::OkStatus();
}

kernels::KvOrder OrderOf(v1::KvOrder order) {
  switch (order) {
    case v1::KV_ORDER_HND:
      return kernels::KvOrder::kHnd;
    case v1::KV_ORDER_NH2D:
      return kernels::KvOrder::kNh2d;
    case v1::KV_ORDER_HN2D:
      return kernels::KvOrder::kHn2d;
    default:
      return kernels::KvOrder::kNhd;
  }
}

// Makes the further receivers of a request that are called. They are as many as its places, and
// only they know the key.
absl::Status AddPushes(const v1::PrefillRequest& request, const RequestLimits& limits,
                       PrefillWork& work) {
  if (request.pushes().empty()) return absl::OkStatus();
  const model::EngineInfo& engine = *limits.engine;
  work.takes_kv = false;
  work.num_receivers = 1 + request.pushes_size();
  work.receiver_key = NewKey();
  for (int i = 0; i < request.pushes_size(); ++i) {
    PrefillWork& push = work.further_pushes.emplace_back();
    auto layout = ResolveLayout(request.pushes(i).layout(), request.token_ids_size(), engine);
    const std::string field = absl::StrCat("pushes[", i, "].");
    if (!layout.ok()) return wire::WithPrefix(field, layout.status());
    const absl::Status lanes = CheckLanes(request.pushes(i).num_lanes(), limits);
    if (!lanes.ok()) return wire::WithPrefix(field, lanes);
    push.layout = *std::move(layout);
    push.id = work.id;
    push.receiver = i + 1;
    push.receiver_key = work.receiver_key;
    push.deliver_to = request.pushes(i).deliver_to();
    ResolvePush(request.pushes(i).num_lanes(), limits, push);
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<PrefillWork> ValidateRequest(const v1::PrefillRequest& request,
                                            const RequestLimits& limits) {
  const model::EngineInfo& engine = *limits.engine;
  PREFILLD_RETURN_IF_ERROR(wire::CheckId("request_id", request.request_id()));
  PREFILLD_RETURN_IF_ERROR(CheckFingerprint(request.model_fingerprint(), engine));
  PREFILLD_RETURN_IF_ERROR(CheckTokens(request, engine));
  PrefillWork work;
  PREFILLD_ASSIGN_OR_RETURN(work.layout,
                            ResolveLayout(request.layout(), request.token_ids_size(), engine));
  PREFILLD_ASSIGN_OR_RETURN(
      work.attention,
      ResolveAttention(request.attention(), request.token_ids_size(), limits.attention));
  work.beyond_calibration = request.token_ids_size() > limits.attention.calibrated_tokens;
  PREFILLD_ASSIGN_OR_RETURN(work.sampling, ResolveSampling(request.sampling()));
  PREFILLD_RETURN_IF_ERROR(CheckLogprobs(request));
  PREFILLD_RETURN_IF_ERROR(CheckLanes(request.num_lanes(), limits));
  PREFILLD_RETURN_IF_ERROR(CheckReceivers(request));
  PREFILLD_RETURN_IF_ERROR(CheckPriority(request));
  PREFILLD_RETURN_IF_ERROR(CheckDelivery(request, limits));
  PREFILLD_RETURN_IF_ERROR(wire::CheckId("prefix_cache.salt", request.prefix_cache().salt()));

  work.id = request.request_id().empty() ? NewRequestId() : request.request_id();
  work.tokens.assign(request.token_ids().begin(), request.token_ids().end());
  work.num_lanes = request.num_lanes() == 0 ? 1 : static_cast<int>(request.num_lanes());
  if (work.num_lanes > 1 && !request.has_deliver_to()) work.lane_key = NewKey();
  work.num_receivers = std::max(1, static_cast<int>(request.num_receivers()));
  work.receiver_key = request.receiver_key();
  if (work.num_receivers > 1 && work.receiver_key.empty()) work.receiver_key = NewKey();
  work.layer_stats = request.layer_stats();
  work.prompt_logprobs = request.prompt_logprobs();
  work.use_prefix_cache = !request.prefix_cache().bypass();
  work.cache_salt = request.prefix_cache().salt();
  work.deliver_to = request.deliver_to();
  work.priority = request.priority();
  PREFILLD_RETURN_IF_ERROR(
      ResolveResumption(request.request_id(), request.resume_key(), limits, work));
  if (work.pushes()) ResolvePush(request.num_lanes(), limits, work);
  PREFILLD_RETURN_IF_ERROR(AddPushes(request, limits, work));
  work.shared_memory = OfferSharedMemory(limits.shared_memory, work, NewKey());
  return work;
}

absl::StatusOr<PrefillWork> ValidateReceiver(const v1::AttachReceiverRequest& request,
                                             const RequestLimits& limits) {
  const model::EngineInfo& engine = *limits.engine;
  if (request.request_id().empty()) {
    return absl::InvalidArgumentError("request_id is empty; a receiver names its request");
  }
  PREFILLD_RETURN_IF_ERROR(wire::CheckId("request_id", request.request_id()));
  PREFILLD_RETURN_IF_ERROR(wire::CheckId("receiver_key", request.receiver_key()));
  PREFILLD_RETURN_IF_ERROR(CheckFingerprint(request.model_fingerprint(), engine));
  if (request.receiver() < 1 || request.receiver() >= kMaxReceivers) {
    return absl::InvalidArgumentError(
        absl::StrCat("receiver ", request.receiver(), "; from 1 to ", kMaxReceivers - 1));
  }
  if (request.num_tokens() < 1 || request.num_tokens() > engine.max_tokens) {
    return absl::InvalidArgumentError(
        absl::StrCat("num_tokens ", request.num_tokens(), "; from 1 to ", engine.max_tokens));
  }
  PREFILLD_RETURN_IF_ERROR(CheckLanes(request.num_lanes(), limits));
  PrefillWork work;
  PREFILLD_ASSIGN_OR_RETURN(work.layout,
                            ResolveLayout(request.layout(), request.num_tokens(), engine));
  work.id = request.request_id();
  work.receiver = static_cast<int>(request.receiver());
  work.receiver_key = request.receiver_key();
  work.num_lanes = std::max(1, static_cast<int>(request.num_lanes()));
  if (work.num_lanes > 1) work.lane_key = NewKey();
  PREFILLD_RETURN_IF_ERROR(
      ResolveResumption(request.request_id(), request.resume_key(), limits, work));
  work.shared_memory = OfferSharedMemory(limits.shared_memory, work, NewKey());
  return work;
}

int64_t PrefillWork::kv_bytes() const {
  return layout.num_layers() * num_sent_blocks() * wire::KvPairBytes(layout);
}

std::string PrefillWork::NameOf(const std::string& id, uint32_t receiver) {
  return receiver == 0 ? id : absl::StrCat(id, "\n", receiver);
}

model::PromptInput InputOf(const PrefillWork& work) {
  return {.tokens = work.tokens,
          .attention = work.attention,
          .logprobs = work.prompt_logprobs,
          .use_prefix_cache = work.use_prefix_cache,
          .cache_salt = work.cache_salt};
}

model::KvSelection SelectBlocks(const v1::KvLayout& layout, int64_t first_block,
                                int64_t num_blocks) {
  model::KvSelection selection;
  selection.first_block = first_block;
  selection.num_blocks = num_blocks;
  selection.block_tokens = static_cast<int>(layout.block_tokens());
  selection.first_head = static_cast<int>(layout.first_head());
  selection.num_heads = static_cast<int>(layout.num_heads());
  selection.order = OrderOf(layout.order());
  selection.dtype = layout.dtype() == v1::DTYPE_FP32   ? kernels::DType::kFp32
                    : layout.dtype() == v1::DTYPE_FP16 ? kernels::DType::kFp16
                                                       : kernels::DType::kBf16;
  if (wire::HasScales(layout.dtype())) {
    selection.scales = layout.scales() == v1::KV_SCALES_PER_BLOCK ? kernels::KvScales::kPerBlock
                                                                  : kernels::KvScales::kPerToken;
  }
  return selection;
}

v1::DType ToProto(kernels::DType dtype) {
  switch (dtype) {
    case kernels::DType::kBf16:
      return v1::DTYPE_BF16;
    case kernels::DType::kFp16:
      return v1::DTYPE_FP16;
    case kernels::DType::kFp32:
      return v1::DTYPE_FP32;
  }
  return v1::DTYPE_UNSPECIFIED;
}

}  // namespace prefilld::server
