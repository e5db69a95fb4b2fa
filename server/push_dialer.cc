#include "server/push_dialer.h"

#include <utility>

#include "server/push_transfer.h"

namespace prefilld::server {

PushDialer::PushDialer(std::shared_ptr<grpc::ChannelCredentials> credentials, bool use_proxy,
                       const Clock& clock, absl::Duration stall_timeout, ResumptionMetrics& metrics)
    : credentials_(std::move(credentials)),
      use_proxy_(use_proxy),
      clock_(clock),
      patience_(2 * stall_timeout + absl::Seconds(30)),
      metrics_(metrics) {}

void PushDialer::Start(std::shared_ptr<PrefillJob> job, std::function<void()> on_done) {
  lookup_.Log(job->work().id, job->work().deliver_to.address());
  std::make_shared<PushTransfer>(std::move(job), *this, std::move(on_done))->Start();
}

void PushDialer::AwaitIdle() {
  absl::MutexLock lock(&open_->mu);
  const auto idle = [this]() ABSL_SHARED_LOCKS_REQUIRED(open_->mu) { return open_->lanes == 0; };
  open_->mu.Await(absl::Condition(&idle));
}

}  // namespace prefilld::server
