#include "proto/process/health.h"

#include <utility>

#include <grpcpp/health_check_service_interface.h>

namespace prefilld::process {
namespace {

constexpr char kWholeServer[] = "";
constexpr char kLiveness[] = "liveness";

}  // namespace

Health::Health(grpc::HealthCheckServiceInterface* service, std::vector<std::string> names)
    : service_(service), names_(std::move(names)) {
  // gRPC's service starts out serving.
  service_->SetServingStatus(false);
  service_->SetServingStatus(kLiveness, true);
}

void Health::SetReady(bool ready) {
  if (ready_.exchange(ready) == ready) return;
  service_->SetServingStatus(kWholeServer, ready);
  for (const std::string& name : names_) service_->SetServingStatus(name, ready);
}

void Health::SetProgressing(bool progressing) {
  absl::MutexLock lock(&mu_);
  progressing_ = progressing;
  UpdateLive();
}

void Health::SetReachable(bool reachable) {
  absl::MutexLock lock(&mu_);
  reachable_ = reachable;
  UpdateLive();
}

bool Health::progressing() const {
  absl::MutexLock lock(&mu_);
  return progressing_;
}

void Health::UpdateLive() {
  const bool live = progressing_ && reachable_;
  if (live_->exchange(live) != live) service_->SetServingStatus(kLiveness, live);
}

}  // namespace prefilld::process
