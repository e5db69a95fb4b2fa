// The frames of one lane that were sent and are not acknowledged.
#ifndef PREFILLD_SERVER_RETAINED_FRAMES_H_
#define PREFILLD_SERVER_RETAINED_FRAMES_H_

#include <cstdint>
#include <deque>
#include <optional>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "server/transport.h"

namespace prefilld::server {

// Each frame shares its staging buffer with the transport that sends it. So the buffer goes back
// when the frame is both written and acknowledged, and until then counts to its request's credit.
//
// The frames that are to be sent once more are a list of numbers beside it.
//
// Not thread-safe; a LaneQueue guards it.
class RetainedFrames {
 public:
  bool empty() const { return frames_.empty(); }
  int64_t size() const { return static_cast<int64_t>(frames_.size()); }

  int64_t bytes() const { return bytes_; }    // of payloads
  int64_t staged() const { return staged_; }  // frames in staging memory

  // Sets the number of the first frame to be kept, before any is.
  void StartAt(uint64_t sequence) { first_ = sequence; }
  // Keeps a frame, whose sequence must be the next one.
  void Add(KvFrame frame);

  // OUT_OF_RANGE: that many were not sent.
  absl::Status CheckAcknowledged(uint64_t received) const;
  // OUT_OF_RANGE: that many were not sent, or more were released, so that no stream can go on
  // there.
  absl::Status CheckResumable(uint64_t received) const;
  // Releases the frames before `received`, if there are any, and returns them, so that the caller
  // can let their buffers go without its lock.
  std::deque<KvFrame> Release(uint64_t received);

  // Has a frame sent once more, because it arrived damaged. Returns false when it is not kept, or
  // waits for that already. ABORTED: it was sent as often as any frame is.
  absl::StatusOr<bool> SendAgain(uint64_t sequence);
  // A way that damages the same frame so often does not become better, and a consumer that says so
  // of every copy would be sent copies for ever. Our clients give up after three.
  static constexpr int kMaxDamagedCopies = 16;
  // Has all frames sent once more, in order.
  void SendAllAgain();
  // Returns the next frame to be sent once more.
  std::optional<KvFrame> NextAgain();
  bool has_again() const { return !again_.empty(); }

  // Gives up everything, for the caller to let go.
  std::deque<KvFrame> TakeAll();

 private:
  uint64_t end() const { return first_ + frames_.size(); }  // number of the next frame

  std::deque<KvFrame> frames_;  // with the numbers from first_ on
  uint64_t first_ = 0;
  int64_t bytes_ = 0;
  int64_t staged_ = 0;
  std::deque<uint64_t> again_;                         // numbers of frames_
  absl::flat_hash_map<uint64_t, int> damaged_copies_;  // of frames_, those that arrived damaged
};

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_RETAINED_FRAMES_H_
