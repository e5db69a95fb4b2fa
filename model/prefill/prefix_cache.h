// The index of a prefix cache: which blocks of tokens have their KV in which slot of its memory.
#ifndef PREFILLD_MODEL_PREFILL_PREFIX_CACHE_H_
#define PREFILLD_MODEL_PREFILL_PREFIX_CACHE_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/node_hash_map.h"
#include "absl/synchronization/mutex.h"
#include "absl/types/span.h"
#include "model/prefill/prefix_events.h"
#include "model/prefill/prefix_key.h"
#include "model/prefill/prefix_reuse.h"
#include "model/sparse/attention_options.h"

namespace prefilld::model {

class PrefixLease;

// The prompt that asks a cache.
struct PrefixQuery {
  std::string domain;  // PrefixDomain()
  absl::Span<const uint32_t> tokens;
  AttentionOptions attention;  // with the policy resolved
  bool is_private = false;     // whoever follows the cache must not see the tokens
};

struct PrefixCacheCounts {
  int64_t lookups = 0;         // prompts that asked
  int64_t hits = 0;            // those that found at least one block
  int64_t hit_tokens = 0;      // tokens of all blocks found
  int64_t stored_blocks = 0;   // blocks that became visible
  int64_t evicted_blocks = 0;  // blocks that made room for others
  // Blocks that were not stored because every slot was in use.
  int64_t skipped_blocks = 0;
  int64_t used_slots = 0;  // at this moment, those being filled included
  int64_t num_slots = 0;
};

// A block is kPrefixBlockTokens tokens after a certain prefix, so blocks form trees: a block's
// parent is the block before it. A block's KV lies in one slot of a memory that belongs to somebody
// else; this class only hands out the numbers of slots, 0 to num_slots - 1. A slot is free, or
// holds one block, or is being filled by one lease.
//
// Blocks are found by their keys, and the tokens are compared too, so a collision of hashes is a
// miss. When slots run out, the leaf that was used least recently makes room, unless a lease holds
// it. Thread-safe.
class PrefixCache {
 public:
  // Keeps so many events for followers.
  PrefixCache(int64_t num_slots, PrefixReuseRule rule, PrefixHash hash = Xxh3PrefixHash,
              size_t num_events = 0);
  ~PrefixCache();

  // Returns how many tokens of the prompt Take would find now. Changes nothing.
  int64_t CountUsable(const PrefixQuery& query) const;

  // Finds the blocks at the beginning of the prompt that may serve it, and reserves slots for the
  // whole blocks behind them, as far as there are slots. The cache must outlive the lease.
  PrefixLease Take(const PrefixQuery& query);

  PrefixCacheCounts counts() const;

  // A PrefixFollower calls these.
  bool keeps_events() const { return num_events_ > 0; }
  uint64_t last_event() const;
  // Returns blocks that are there and were first stored by events above `above` and up to `up_to`,
  // in the order of those events, at most `most` of them, and the last one's event in `*last`.
  std::vector<PrefixEvent> BlocksStored(uint64_t above, uint64_t up_to, size_t most,
                                        uint64_t* last) const;
  // Returns the next events; nullopt: some of those behind this number are gone.
  std::optional<std::vector<PrefixEvent>> EventsBehind(uint64_t number, size_t most) const;
  bool KeepsEventsBehind(uint64_t number) const;

 private:
  friend class PrefixLease;

  struct Block {
    std::string domain;       // of a block without a parent; the others have their parent's
    Block* parent = nullptr;  // null: the first block of a prompt
    PrefixKey key;
    std::array<uint32_t, kPrefixBlockTokens> tokens;
    AttentionOptions computed;  // its KV is at least as exact as with these options
    int slot = 0;
    int children = 0;
    int leases = 0;     // that hold it
    uint64_t used = 0;  // the time of its last use
    bool is_private = false;
    uint64_t first_event = 0;  // the number of the event of its first storing
  };
  using Blocks = std::vector<Block*>;

  PrefixKey RootOf(const PrefixQuery& query) const;
  // Returns the block if it is there, or null.
  Block* Find(const PrefixKey& key, const Block* parent, const PrefixQuery& query,
              int64_t index) const ABSL_SHARED_LOCKS_REQUIRED(mu_);
  // Returns the blocks from the first one on that may serve the prompt, and the last one's key.
  Blocks Walk(const PrefixQuery& query, PrefixKey* last) const ABSL_SHARED_LOCKS_REQUIRED(mu_);
  std::vector<int> ReserveSlots(int64_t wanted) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  bool EvictOne() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  static PrefixEvent Describe(const Block& block);
  // These keep evictable_ in step with the block.
  void Hold(Block* block) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void LetGo(Block* block) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void ListIfEvictable(Block* block) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  // A lease calls these.
  void Publish(const PrefixQuery& query, const Blocks& found, PrefixKey last,
               std::vector<int>& slots);
  void Return(const Blocks& found, const std::vector<int>& slots);
  void ReturnSlots(const std::vector<int>& slots) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Makes one block visible and returns it; null if another block has its key. A slot that is not
  // needed stays in `slot`, otherwise -1 does.
  Block* Store(const PrefixQuery& query, const PrefixKey& key, Block* parent, int64_t index,
               int* slot) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const int64_t num_slots_;
  const PrefixReuseRule rule_;
  const PrefixHash hash_;
  const size_t num_events_;

  mutable absl::Mutex mu_;
  absl::node_hash_map<PrefixKey, Block> blocks_ ABSL_GUARDED_BY(mu_);
  // Blocks without children and leases, the least recently used first.
  std::set<std::pair<uint64_t, Block*>> evictable_ ABSL_GUARDED_BY(mu_);
  // The lowest go first, so that neighbours in a prompt tend to be neighbours in memory, which are
  // copied as one.
  std::set<int> free_slots_ ABSL_GUARDED_BY(mu_);
  uint64_t time_ ABSL_GUARDED_BY(mu_) = 0;  // counts uses
  PrefixEventLog events_ ABSL_GUARDED_BY(mu_);
  // All blocks by first_event, if events are kept.
  std::map<uint64_t, const Block*> by_event_ ABSL_GUARDED_BY(mu_);
  PrefixCacheCounts counts_ ABSL_GUARDED_BY(mu_);
};

// A prompt's hold on blocks of the cache and on slots that it fills. Destroying it gives everything
// back; what was not published is forgotten. Not thread-safe, but other threads may read found()
// and what lies in its slots beside Publish, until Reset or destruction.
class PrefixLease {
 public:
  PrefixLease() = default;  // of nothing
  PrefixLease(PrefixLease&& other) noexcept { *this = std::move(other); }
  PrefixLease& operator=(PrefixLease&& other) noexcept;
  ~PrefixLease() { Reset(); }

  void Reset();

  // The slots of blocks 0 .. n - 1 of the prompt, to be read. At least one token of the prompt is
  // behind them.
  absl::Span<const int> found() const {
    return absl::MakeConstSpan(found_slots_).first(static_cast<size_t>(num_found_));
  }
  int64_t found_tokens() const { return num_found_ * kPrefixBlockTokens; }
  // The slots to be filled, of blocks first_new_block() and on.
  absl::Span<const int> added() const { return added_; }
  int64_t first_new_block() const { return static_cast<int64_t>(found_slots_.size()); }

  // Makes the blocks of added() visible, and gives the slots back that others have filled already,
  // so that it adds nothing more. All of their KV must be in its slots. What was found stays held.
  void Publish();

 private:
  friend class PrefixCache;

  PrefixCache* cache_ = nullptr;
  PrefixQuery query_;             // its tokens are in tokens_
  std::vector<uint32_t> tokens_;  // of the prompt's whole blocks
  PrefixCache::Blocks blocks_;    // held
  std::vector<int> found_slots_;  // of blocks_
  int64_t num_found_ = 0;         // those of them to be read
  PrefixKey last_key_ = {};       // of the last of blocks_, or the root
  std::vector<int> added_;
};

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_PREFILL_PREFIX_CACHE_H_
