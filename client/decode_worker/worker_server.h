#ifndef PREFILLD_CLIENT_DECODE_WORKER_WORKER_SERVER_H_
#define PREFILLD_CLIENT_DECODE_WORKER_WORKER_SERVER_H_

#include <memory>

#include "absl/status/statusor.h"
#include "client/decode_worker/options.h"
#include "model/checkpoint/config.h"
#include "proto/wire/listener.h"

namespace prefilld::client {

class GenerateService;
class ReceiverService;

// Serves both services, health and reflection at options.listen. Limits the size and number of what
// callers may send. INVALID_ARGUMENT and UNAVAILABLE: as wire::Listener::Create.
absl::StatusOr<std::unique_ptr<wire::Listener>> StartWorkerServer(const WorkerOptions& options,
                                                                  const model::ModelConfig& model,
                                                                  GenerateService& generate,
                                                                  ReceiverService& receiver,
                                                                  wire::Arrivals& arrivals);

// Returns enough for a frame of the model's cache and for a prompt that fills the pool twice, so
// that a prompt somewhat above the limit is told the limit.
int MaxMessageBytes(const WorkerOptions& options, const model::ModelConfig& model);

// Returns how many calls one connection may have open at once. More wait in the client.
int MaxStreamsPerConnection(const WorkerOptions& options);

}  // namespace prefilld::client

#endif  // PREFILLD_CLIENT_DECODE_WORKER_WORKER_SERVER_H_
