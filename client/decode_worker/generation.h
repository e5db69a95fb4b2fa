// One Generate request, from its validation to its last token.
#ifndef PREFILLD_CLIENT_DECODE_WORKER_GENERATION_H_
#define PREFILLD_CLIENT_DECODE_WORKER_GENERATION_H_

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "client/cancellation.h"
#include "client/decode_worker/decode_loop.h"
#include "client/decode_worker/kv_block_pool.h"
#include "client/decode_worker/metrics.h"
#include "client/decode_worker/options.h"
#include "client/decode_worker/pending_transfers.h"
#include "client/prefill_client.h"
#include "model/decode/decoder.h"
#include "prefill/v1/decode.pb.h"
#include "proto/wire/trace_context.h"

namespace prefilld::client {

// The parts of a worker that all its requests share. All are borrowed.
struct WorkerContext {
  const WorkerOptions* options = nullptr;
  model::Decoder* decoder = nullptr;
  KvBlockPool* pool = nullptr;
  DecodeLoop* loop = nullptr;
  PrefillClient* prefill = nullptr;  // null: only pushed caches
  PendingTransfers* transfers = nullptr;
  WorkerMetrics* metrics = nullptr;
};

// Takes the events of a generation.
class EventWriter {
 public:
  virtual ~EventWriter() = default;
  // Blocks until the transport has taken the event. CANCELLED when nobody reads any more.
  virtual absl::Status Write(const ::prefill::v1::GenerateEvent& event) = 0;
};

// Facts about a request that its message does not hold.
struct CallFacts {
  std::string request_id;  // never empty
  absl::Time arrival;      // the time from which reported times count
  absl::Time deadline = absl::InfiniteFuture();
  wire::TraceContext trace;
};

// Runs the request in the calling thread. Every resource that it took is released on return.
absl::Status Generate(const WorkerContext& worker, const ::prefill::v1::GenerateRequest& request,
                      const CallFacts& facts, Cancellation& cancellation, EventWriter& writer);

}  // namespace prefilld::client

#endif  // PREFILLD_CLIENT_DECODE_WORKER_GENERATION_H_
