// The decision when a stream of a resumable transfer has broken.
#ifndef PREFILLD_PROTO_WIRE_LANE_PATIENCE_H_
#define PREFILLD_PROTO_WIRE_LANE_PATIENCE_H_

#include <cstdint>
#include <optional>

#include "absl/status/status.h"
#include "absl/time/time.h"

namespace prefilld::wire {

// Belongs to one lane, at the end that opens its streams: the client that pulls, the server that
// pushes. That end goes on opening streams until the window of the transfer has passed without
// a stream and without anything new having arrived. Thread-compatible.
class LanePatience {
 public:
  enum class Next : uint8_t {
    kResume,     // attach again, after pause()
    kStartAnew,  // the server does not know the request: send it once more
    kGiveUp,     // with reason()
  };

  struct State {                                   // of the transfer
    bool accepted = false;                         // by the other end
    absl::Duration window = absl::ZeroDuration();  // known once it is accepted
    uint64_t progress = 0;                         // grows with everything new that arrives
  };

  // Takes the end of a stream that was not its good end.
  Next OnBroken(const absl::Status& ended, const State& state, absl::Time now);

  // The other end has answered on the latest stream. The time until that breaks is not lost: it may
  // have nothing new to bring.
  void OnHeard(absl::Time now) { heard_at_ = now; }
  bool is_heard() const { return heard_at_.has_value(); }

  absl::Duration pause() const;
  const absl::Status& reason() const { return reason_; }

 private:
  std::optional<uint64_t> progress_;    // at the latest break
  absl::Time broken_at_;                // the first break since there was progress; see OnHeard
  std::optional<absl::Time> heard_at_;  // on the stream that is there
  int attempts_ = 0;                    // to resume, since then
  int starts_ = 0;                      // that went unheard
  absl::Status reason_;
};

}  // namespace prefilld::wire

#endif  // PREFILLD_PROTO_WIRE_LANE_PATIENCE_H_
