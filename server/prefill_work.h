// One request after validation: what to compute, and the form in which to deliver it. Also a
// further receiver of a request, which has a form of its own, and computes nothing.
#ifndef PREFILLD_SERVER_PREFILL_WORK_H_
#define PREFILLD_SERVER_PREFILL_WORK_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "model/decode/sampling.h"
#include "model/prefill/prefill_engine.h"
#include "prefill/v1/prefill.pb.h"
#include "proto/wire/same_key.h"
#include "server/attention_request.h"
#include "server/caller.h"
#include "server/shared_memory_offer.h"

namespace prefilld::server {

struct PrefillWork {
  std::string id;
  std::vector<uint32_t> tokens;
  model::AttentionOptions attention;
  model::SamplingOptions sampling;
  ::prefill::v1::KvLayout layout;  // every default resolved
  int num_lanes = 1;
  bool lanes_are_chosen = false;  // by the server: the tenant's limit lowers them
  std::string lane_key;           // what attached lanes must show; empty if there are none
  int num_receivers = 1;          // of what is computed, this call included
  std::string receiver_key;       // what other receivers must show, and what such a receiver shows
  int receiver = 0;               // its number; those from 1 on have no tokens
  std::string resume_key;         // what a consumer shows that comes back; empty: it cannot
  // How long a consumer that can come back may be away, or the receiver of a push.
  absl::Duration resume_window = absl::ZeroDuration();
  ::prefill::v1::SharedMemoryOffer shared_memory;  // its key is empty if there is none
  bool layer_stats = false;
  bool prompt_logprobs = false;
  bool use_prefix_cache = true;
  std::string cache_salt;
  ::prefill::v1::DeliverTo deliver_to;  // address empty: the KV goes back on the call's streams
  std::string transfer_key;             // what later streams of the push show to the receiver
  absl::Time deadline = absl::InfiniteFuture();  // by the server's clock
  Caller caller;
  int tenant = 0;    // its position in the operator's table
  int priority = 0;  // its class; what was asked for, until the service caps it
  // The prompt is too long for the loss that the cluster file promises, so its thresholds and
  // groups do not count.
  bool beyond_calibration = false;

  // Further receivers, which are called: then the request's own call takes no KV.
  std::vector<PrefillWork> further_pushes;
  bool takes_kv = true;

  bool resumable() const { return !resume_key.empty(); }
  bool pushes() const { return !deliver_to.address().empty(); }
  // The id; of a further receiver with its number behind a line break, which no id has.
  std::string name() const { return NameOf(id, static_cast<uint32_t>(receiver)); }
  static std::string NameOf(const std::string& id, uint32_t receiver);
  // The number of blocks to send per layer.
  int64_t num_sent_blocks() const { return layout.num_blocks() - layout.first_block(); }
  int64_t kv_bytes() const;  // of all payloads
};

// The limits that requests must keep; fixed at start.
struct RequestLimits {
  const model::EngineInfo* engine = nullptr;
  AttentionLimits attention;
  std::vector<std::string> deliver_to_allow;
  int max_lanes = 1;
  absl::Duration resume_window = absl::ZeroDuration();  // 0: no request or push is resumable
  SharedMemoryTerms shared_memory;
};

// Validates a request. An empty request_id is replaced by a new one. Errors:
// - INVALID_ARGUMENT names field, value and limit.
// - FAILED_PRECONDITION: another model was asked for.
// - PERMISSION_DENIED: the operator does not allow a push to this address.
// - UNIMPLEMENTED: a push was asked for, and the operator allows none.
absl::StatusOr<PrefillWork> ValidateRequest(const ::prefill::v1::PrefillRequest& request,
                                            const RequestLimits& limits);

// Validates the call of a further receiver as far as that is possible without its request. Errors
// as above.
absl::StatusOr<PrefillWork> ValidateReceiver(const ::prefill::v1::AttachReceiverRequest& request,
                                             const RequestLimits& limits);

using wire::IsSameKey;

// Describes a prompt to the engine. The work is borrowed.
model::PromptInput InputOf(const PrefillWork& work);

// The longest prompt whose log-probabilities fit, with room to spare, into a message of 4 MiB,
// which is what gRPC clients accept by default.
inline constexpr int kMaxPromptLogprobsTokens = 262144;

// Selects a run of blocks of `layout`.
model::KvSelection SelectBlocks(const ::prefill::v1::KvLayout& layout, int64_t first_block,
                                int64_t num_blocks);

::prefill::v1::DType ToProto(kernels::DType dtype);

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_PREFILL_WORK_H_
