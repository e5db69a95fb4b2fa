// The decision of a client whose stream of a resumable request has broken.
#ifndef PREFILLD_CLIENT_LANE_PATIENCE_H_
#define PREFILLD_CLIENT_LANE_PATIENCE_H_

#include <cstdint>
#include <optional>

#include "absl/status/status.h"
#include "absl/time/time.h"

namespace prefilld::client {

// Belongs to one lane. A client goes on attaching again until the server's window has passed
// without anything new having arrived. Thread-compatible.
class LanePatience {
 public:
  enum class Next : uint8_t {
    kResume,     // attach again, after pause()
    kStartAnew,  // the server does not know the request: send it once more
    kGiveUp,     // with reason()
  };

  struct State {  // of the request
    bool accepted = false;
    absl::Duration window = absl::ZeroDuration();  // of Accepted
    uint64_t progress = 0;                         // grows with everything new that arrives
  };

  // Takes the end of a stream that was not its good end.
  Next OnBroken(const absl::Status& ended, const State& state, absl::Time now);

  absl::Duration pause() const;
  const absl::Status& reason() const { return reason_; }

 private:
  std::optional<uint64_t> progress_;  // at the latest break
  absl::Time broken_at_;              // the first break since there was progress
  int attempts_ = 0;                  // to resume, since then
  int starts_ = 0;                    // that went unheard
  absl::Status reason_;
};

}  // namespace prefilld::client

#endif  // PREFILLD_CLIENT_LANE_PATIENCE_H_
