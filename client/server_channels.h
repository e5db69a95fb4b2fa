// The connections of a client to one server.
#ifndef PREFILLD_CLIENT_SERVER_CHANNELS_H_
#define PREFILLD_CLIENT_SERVER_CHANNELS_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "client/shared_memory_pool.h"
#include "proto/wire/channel.h"

namespace grpc {
class ChannelCredentials;
}

namespace prefilld::client {

// One channel for each lane, opened when the lane is first used and kept. Thread-safe.
class ServerChannels {
 public:
  // `credentials` are those of options.tls.
  ServerChannels(const wire::ChannelOptions& options,
                 std::shared_ptr<grpc::ChannelCredentials> credentials);

  // Returns the channels of lanes 0 to num_lanes - 1.
  std::vector<std::shared_ptr<grpc::Channel>> OfLanes(uint32_t num_lanes);

  // Returns the shared memory of calls to this server.
  SharedMemoryPool& memories() { return memories_; }

  // Tells whether lane 0 is connected, or has yet to be, rather than known to be without a server.
  bool MayBeReached();

  // The bytes of KV that a token had when this server last accepted a request; 0: it has not yet.
  uint64_t kv_bytes_per_token() const { return kv_bytes_per_token_.load(); }
  void NoteKvBytesPerToken(uint64_t bytes) { kv_bytes_per_token_.store(bytes); }
  // Tells whether a call may have one lane alone, because further connections may end at another
  // server than the first (lane_choice.h) or a call has shown it. The answer is kept until Renew.
  bool HasOneLane();
  // Must be called once lanes ended at another server, whatever the name says, and once more than
  // one was refused.
  void NoteOneLane();

  // Replaces channels that have no connection, for later calls. Must be called after a call that
  // found the server unavailable. A channel to a name that could not be resolved waits for up to
  // two minutes before it looks again, and takes no setting for that; a new one looks at once.
  void Renew();

 private:
  struct Lane {
    std::shared_ptr<grpc::Channel> channel;
    absl::Time opened;
  };

  Lane Open() const;

  const wire::ChannelOptions options_;
  const std::shared_ptr<grpc::ChannelCredentials> credentials_;
  absl::Mutex mu_;
  std::vector<Lane> lanes_ ABSL_GUARDED_BY(mu_);
  std::optional<bool> has_one_lane_ ABSL_GUARDED_BY(mu_);
  std::atomic<uint64_t> kv_bytes_per_token_ = 0;
  SharedMemoryPool memories_;
};

}  // namespace prefilld::client

#endif  // PREFILLD_CLIENT_SERVER_CHANNELS_H_
