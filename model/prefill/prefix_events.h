// The changes of a prefix cache, for those who keep a picture of what it holds.
#ifndef PREFILLD_MODEL_PREFILL_PREFIX_EVENTS_H_
#define PREFILLD_MODEL_PREFILL_PREFIX_EVENTS_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <optional>
#include <vector>

#include "absl/status/statusor.h"
#include "model/prefill/prefix_key.h"
#include "model/sparse/attention_policy.h"

namespace prefilld::model {

class PrefixCache;

// A block became visible, was computed anew by another policy, or left.
struct PrefixEvent {
  bool stored = true;  // otherwise it was removed, and only its key is set
  PrefixKey key = {};
  std::optional<PrefixKey> parent = std::nullopt;  // none: the first block of a prompt
  AttentionPolicy policy = AttentionPolicy::kDense;
  bool is_private = false;  // see PrefixQuery
  std::array<uint32_t, kPrefixBlockTokens> tokens = {};
};

// The latest events. They are numbered from 1, without gaps. Not thread-safe.
class PrefixEventLog {
 public:
  // Keeps so many events, which take 600 bytes each. 0: none, and nobody can follow.
  explicit PrefixEventLog(size_t capacity) : capacity_(capacity) {}

  size_t capacity() const { return capacity_; }
  uint64_t last() const { return last_; }  // the number of the latest event
  void Append(const PrefixEvent& event);
  // Tells whether all events behind this number are still there.
  bool Has(uint64_t behind) const { return last_ - behind <= events_.size(); }
  // Returns the next events behind this number, as many as there are but at most `most`. All of
  // them must be there.
  std::vector<PrefixEvent> Read(uint64_t behind, size_t most) const;

 private:
  const size_t capacity_;
  uint64_t last_ = 0;
  std::deque<PrefixEvent> events_;
};

// Reads a cache for somebody who knows nothing yet: first the blocks that it holds, then its
// changes. Whoever applies all of it in order, taking a stored block that is known as news about it
// and a removed one that is not known as nothing, holds what the cache holds. A block comes after
// its parent. Not thread-safe.
class PrefixFollower {
 public:
  // The cache is borrowed. It must keep events.
  explicit PrefixFollower(const PrefixCache& cache);

  struct Batch {
    bool in_snapshot = false;  // of what the cache held when the follower was made
    uint64_t last = 0;         // the number of the latest change that is told with this batch
    std::vector<PrefixEvent> events;
  };
  // Returns the next batch of at most `most` events; none: there is nothing new. One batch behind
  // the snapshot comes even if it is empty. ABORTED: the changes came faster than they were read,
  // and some are gone.
  absl::StatusOr<std::optional<Batch>> Next(size_t most);
  // Tells whether Next would be ABORTED.
  bool IsBehind() const;

 private:
  const PrefixCache& cache_;
  const uint64_t began_at_;
  uint64_t last_;                // of the changes that were told
  uint64_t snapshot_up_to_ = 0;  // of the blocks that were told, the last one's number
  bool in_snapshot_ = true;
};

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_PREFILL_PREFIX_EVENTS_H_
