#include "client/decode_worker/worker_server.h"

#include <algorithm>
#include <limits>

#include "client/decode_worker/generate_service.h"
#include "client/decode_worker/receiver_service.h"
#include "proto/wire/kv_layout.h"

namespace prefilld::client {

int MaxMessageBytes(const WorkerOptions& options, const model::ModelConfig& model) {
  // A frame of prefilld has at most 4 MiB or the bytes of its largest block, whatever blocks were
  // asked for.
  constexpr int64_t kFrameBytes = int64_t{4} << 20;
  constexpr int64_t kTokenBytes = 5;  // an id as varint
  constexpr int64_t kOtherFields = int64_t{1} << 20;
  const int64_t block_bytes = wire::MaxKvPairBytes(model.num_kv_heads, model.head_dim);
  const int64_t payload =
      std::max({kFrameBytes, block_bytes, 2 * kTokenBytes * options.decoder.pool_tokens});
  return static_cast<int>(
      std::min<int64_t>(payload + kOtherFields, std::numeric_limits<int32_t>::max()));
}

// Allows a Generate and a Receive for every request that can run, probes, and as many refused ones.
int MaxStreamsPerConnection(const WorkerOptions& options) { return 2 * options.max_requests + 64; }

absl::StatusOr<std::unique_ptr<wire::Listener>> StartWorkerServer(const WorkerOptions& options,
                                                                  const model::ModelConfig& model,
                                                                  GenerateService& generate,
                                                                  ReceiverService& receiver,
                                                                  wire::Arrivals& arrivals) {
  return wire::Listener::Create({.address = options.listen,
                                 .tls = options.tls,
                                 .max_request_bytes = MaxMessageBytes(options, model),
                                 .max_streams = MaxStreamsPerConnection(options),
                                 .max_connections = options.max_connections,
                                 .streams_arrive = true,
                                 .stall_timeout = options.stall_timeout,
                                 .arrivals = &arrivals},
                                {&generate, &receiver});
}

}  // namespace prefilld::client
