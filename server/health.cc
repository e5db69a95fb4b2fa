#include "server/health.h"

#include <grpcpp/health_check_service_interface.h>

#include "prefill/v1/prefill.grpc.pb.h"

namespace prefilld::server {
namespace {

constexpr char kWholeServer[] = "";
constexpr char kLiveness[] = "liveness";

}  // namespace

Health::Health(grpc::HealthCheckServiceInterface* service) : service_(service) {
  // gRPC's service starts out serving.
  service_->SetServingStatus(false);
  service_->SetServingStatus(kLiveness, true);
}

void Health::SetReady(bool ready) {
  if (ready_.exchange(ready) == ready) return;
  service_->SetServingStatus(kWholeServer, ready);
  service_->SetServingStatus(::prefill::v1::PrefillService::service_full_name(), ready);
}

void Health::SetLive(bool live) {
  if (live_.exchange(live) != live) service_->SetServingStatus(kLiveness, live);
}

}  // namespace prefilld::server
