#include "client/server_channels.h"

#include <utility>

#include "absl/time/clock.h"
#include "client/lane_choice.h"
#include "grpcpp/channel.h"
#include "grpcpp/security/credentials.h"

namespace prefilld::client {
namespace {

// A server that is away is not called more often than that, however many requests come.
constexpr absl::Duration kLeastAge = absl::Seconds(2);

}  // namespace

ServerChannels::ServerChannels(const wire::ChannelOptions& options,
                               std::shared_ptr<grpc::ChannelCredentials> credentials)
    : options_(options), credentials_(std::move(credentials)) {}

ServerChannels::Lane ServerChannels::Open() const {
  return {.channel = wire::OpenChannel(options_, credentials_), .opened = absl::Now()};
}

std::vector<std::shared_ptr<grpc::Channel>> ServerChannels::OfLanes(uint32_t num_lanes) {
  absl::MutexLock lock(&mu_);
  while (lanes_.size() < num_lanes) lanes_.push_back(Open());
  std::vector<std::shared_ptr<grpc::Channel>> channels;
  for (uint32_t lane = 0; lane < num_lanes; ++lane) channels.push_back(lanes_[lane].channel);
  return channels;
}

bool ServerChannels::MayBeReached() {
  absl::MutexLock lock(&mu_);
  if (lanes_.empty()) return true;
  const grpc_connectivity_state state = lanes_.front().channel->GetState(/*try_to_connect=*/false);
  return state == GRPC_CHANNEL_READY || state == GRPC_CHANNEL_IDLE;
}

// A name server is asked without the lock, because other calls must not wait for it.
bool ServerChannels::HasOneLane() {
  {
    absl::MutexLock lock(&mu_);
    if (has_one_lane_.has_value()) return *has_one_lane_;
  }
  const bool several = client::StandsForSeveral(options_.address);
  absl::MutexLock lock(&mu_);
  has_one_lane_ = several;
  return several;
}

void ServerChannels::NoteOneLane() {
  absl::MutexLock lock(&mu_);
  has_one_lane_ = true;
}

void ServerChannels::Renew() {
  absl::MutexLock lock(&mu_);
  has_one_lane_.reset();
  for (Lane& lane : lanes_) {
    const bool failed = lane.channel->GetState(false) == GRPC_CHANNEL_TRANSIENT_FAILURE;
    if (failed && absl::Now() - lane.opened >= kLeastAge) lane = Open();
  }
}

}  // namespace prefilld::client
