// The KV of one request on its way to a decode worker that prefilld calls (KvReceiver).
#ifndef PREFILLD_SERVER_PUSH_STREAM_H_
#define PREFILLD_SERVER_PUSH_STREAM_H_

#include <memory>

#include <grpcpp/security/credentials.h>

#include "server/prefill_job.h"

namespace prefilld::server {

// Opens the call to work().deliver_to and attaches it to the job's lane 0. The job ends with the
// receiver's status if the receiver refuses, fails or goes away.
void StartPush(std::shared_ptr<PrefillJob> job,
               const std::shared_ptr<grpc::ChannelCredentials>& credentials);

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_PUSH_STREAM_H_
