#ifndef PREFILLD_CLIENT_DECODE_WORKER_WORKER_SERVER_H_
#define PREFILLD_CLIENT_DECODE_WORKER_WORKER_SERVER_H_

#include "absl/status/statusor.h"
#include "client/decode_worker/options.h"
#include "model/checkpoint/config.h"
#include "proto/wire/listener.h"

namespace prefilld::client {

class GenerateService;
class ReceiverService;

// Serves both, health and reflection at options.listen. Size and number of what callers may send
// are limited. INVALID_ARGUMENT and UNAVAILABLE: as wire::Listen.
absl::StatusOr<wire::Listener> StartWorkerServer(const WorkerOptions& options,
                                                 const model::ModelConfig& model,
                                                 GenerateService& generate,
                                                 ReceiverService& receiver);

// Enough for a frame of the model's cache and for a prompt that fills the pool twice, so that a
// prompt a good deal too long is told the limit.
int MaxMessageBytes(const WorkerOptions& options, const model::ModelConfig& model);

// Calls that one connection may have open at once; more wait in the client.
int MaxStreamsPerConnection(const WorkerOptions& options);

}  // namespace prefilld::client

#endif  // PREFILLD_CLIENT_DECODE_WORKER_WORKER_SERVER_H_
