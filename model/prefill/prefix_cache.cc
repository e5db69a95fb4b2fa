#include "model/prefill/prefix_cache.h"

#include <algorithm>

namespace prefilld::model {
namespace {

int64_t WholeBlocks(int64_t num_tokens) { return num_tokens / kPrefixBlockTokens; }

// The last token's hidden state is needed, so one token at least is computed.
int64_t LoadableBlocks(const PrefixQuery& query) {
  return WholeBlocks(std::max<int64_t>(0, static_cast<int64_t>(query.tokens.size()) - 1));
}

absl::Span<const uint32_t> TokensOf(const PrefixQuery& query, int64_t block) {
  return query.tokens.subspan(static_cast<size_t>(block * kPrefixBlockTokens), kPrefixBlockTokens);
}

}  // namespace

PrefixCache::PrefixCache(int64_t num_slots, PrefixReuseRule rule, PrefixHash hash,
                         size_t num_events)
    : num_slots_(num_slots),
      rule_(rule),
      hash_(hash),
      num_events_(num_events),
      events_(num_events) {
  absl::MutexLock lock(&mu_);
  for (int slot = 0; slot < num_slots; ++slot) free_slots_.insert(free_slots_.end(), slot);
}

PrefixCache::~PrefixCache() = default;

PrefixKey PrefixCache::RootOf(const PrefixQuery& query) const {
  return hash_(query.domain.data(), query.domain.size());
}

PrefixCache::Block* PrefixCache::Find(const PrefixKey& key, const Block* parent,
                                      const PrefixQuery& query, int64_t index) const {
  const auto entry = blocks_.find(key);
  if (entry == blocks_.end()) return nullptr;
  const Block& block = entry->second;
  const absl::Span<const uint32_t> tokens = TokensOf(query, index);
  const bool same = block.parent == parent && (parent != nullptr || block.domain == query.domain) &&
                    std::equal(tokens.begin(), tokens.end(), block.tokens.begin());
  return same ? const_cast<Block*>(&block) : nullptr;
}

PrefixCache::Blocks PrefixCache::Walk(const PrefixQuery& query, PrefixKey* last) const {
  Blocks blocks;
  *last = RootOf(query);
  const int64_t end = WholeBlocks(static_cast<int64_t>(query.tokens.size()));
  for (int64_t index = 0; index < end; ++index) {
    const PrefixKey key = PrefixBlockKey(*last, TokensOf(query, index), hash_);
    Block* block = Find(key, blocks.empty() ? nullptr : blocks.back(), query, index);
    if (block == nullptr || !MayReuse(rule_, block->computed, query.attention)) break;
    blocks.push_back(block);
    *last = key;
  }
  return blocks;
}

int64_t PrefixCache::CountUsable(const PrefixQuery& query) const {
  PrefixKey last;
  absl::MutexLock lock(&mu_);
  const auto usable = static_cast<int64_t>(Walk(query, &last).size());
  return std::min(usable, LoadableBlocks(query)) * kPrefixBlockTokens;
}

PrefixLease PrefixCache::Take(const PrefixQuery& query) {
  PrefixLease lease;
  lease.cache_ = this;
  const int64_t whole = WholeBlocks(static_cast<int64_t>(query.tokens.size()));
  lease.tokens_.assign(query.tokens.begin(), query.tokens.begin() + whole * kPrefixBlockTokens);
  lease.query_ = {query.domain, lease.tokens_, query.attention, query.is_private};

  absl::MutexLock lock(&mu_);
  ++counts_.lookups;
  ++time_;
  lease.blocks_ = Walk(query, &lease.last_key_);
  for (Block* block : lease.blocks_) {
    Hold(block);
    lease.found_slots_.push_back(block->slot);
  }
  lease.num_found_ = std::min(lease.first_new_block(), LoadableBlocks(query));
  if (lease.num_found_ > 0) ++counts_.hits;
  counts_.hit_tokens += lease.found_tokens();

  const int64_t wanted = whole - lease.first_new_block();
  lease.added_ = ReserveSlots(wanted);
  counts_.skipped_blocks += wanted - static_cast<int64_t>(lease.added_.size());
  return lease;
}

std::vector<int> PrefixCache::ReserveSlots(int64_t wanted) {
  while (static_cast<int64_t>(free_slots_.size()) < wanted && EvictOne()) {
  }
  const auto count = std::min(static_cast<int64_t>(free_slots_.size()), wanted);
  const auto end = std::next(free_slots_.begin(), count);
  std::vector<int> slots(free_slots_.begin(), end);
  free_slots_.erase(free_slots_.begin(), end);
  return slots;
}

bool PrefixCache::EvictOne() {
  if (evictable_.empty()) return false;
  Block* block = evictable_.begin()->second;
  evictable_.erase(evictable_.begin());
  free_slots_.insert(block->slot);
  ++counts_.evicted_blocks;
  Block* parent = block->parent;
  events_.Append({.stored = false, .key = block->key});
  by_event_.erase(block->first_event);
  blocks_.erase(PrefixKey(block->key));
  if (parent != nullptr) {
    --parent->children;
    ListIfEvictable(parent);
  }
  return true;
}

void PrefixCache::ListIfEvictable(Block* block) {
  if (block->children == 0 && block->leases == 0) evictable_.emplace(block->used, block);
}

void PrefixCache::Hold(Block* block) {
  evictable_.erase({block->used, block});
  ++block->leases;
  block->used = time_;
}

void PrefixCache::LetGo(Block* block) {
  --block->leases;
  ListIfEvictable(block);
}

PrefixCache::Block* PrefixCache::Store(const PrefixQuery& query, const PrefixKey& key,
                                       Block* parent, int64_t index, int* slot) {
  if (blocks_.contains(key)) {
    Block* block = Find(key, parent, query, index);
    // Somebody was faster. What is there stays if it serves this prompt as well, or is being read.
    if (block == nullptr || block->leases > 0 ||
        MayReuse(rule_, block->computed, query.attention)) {
      return block;
    }
    std::swap(block->slot, *slot);
    block->computed = query.attention;
    ++counts_.stored_blocks;
    events_.Append(Describe(*block));
    return block;
  }
  Block& block = blocks_[key];
  if (parent == nullptr) block.domain = query.domain;
  block.parent = parent;
  block.key = key;
  const absl::Span<const uint32_t> tokens = TokensOf(query, index);
  std::copy(tokens.begin(), tokens.end(), block.tokens.begin());
  block.computed = query.attention;
  block.slot = std::exchange(*slot, -1);
  block.used = time_;
  block.is_private = query.is_private;
  if (parent != nullptr) {
    evictable_.erase({parent->used, parent});
    ++parent->children;
  }
  ListIfEvictable(&block);
  ++counts_.stored_blocks;
  if (keeps_events()) {
    events_.Append(Describe(block));
    block.first_event = events_.last();
    by_event_.emplace(block.first_event, &block);
  }
  return &block;
}

PrefixEvent PrefixCache::Describe(const Block& block) {
  PrefixEvent event = {.key = block.key,
                       .policy = block.computed.policy,
                       .is_private = block.is_private,
                       .tokens = block.tokens};
  if (block.parent != nullptr) event.parent = block.parent->key;
  return event;
}

uint64_t PrefixCache::last_event() const {
  absl::MutexLock lock(&mu_);
  return events_.last();
}

std::vector<PrefixEvent> PrefixCache::BlocksStored(uint64_t above, uint64_t up_to, size_t most,
                                                   uint64_t* last) const {
  std::vector<PrefixEvent> blocks;
  absl::MutexLock lock(&mu_);
  for (auto at = by_event_.upper_bound(above);
       at != by_event_.end() && at->first <= up_to && blocks.size() < most; ++at) {
    blocks.push_back(Describe(*at->second));
    *last = at->first;
  }
  return blocks;
}

std::optional<std::vector<PrefixEvent>> PrefixCache::EventsBehind(uint64_t number,
                                                                  size_t most) const {
  absl::MutexLock lock(&mu_);
  if (!events_.Has(number)) return std::nullopt;
  return events_.Read(number, most);
}

bool PrefixCache::KeepsEventsBehind(uint64_t number) const {
  absl::MutexLock lock(&mu_);
  return events_.Has(number);
}

void PrefixCache::Publish(const PrefixQuery& query, const Blocks& found, PrefixKey last,
                          std::vector<int>& slots) {
  absl::MutexLock lock(&mu_);
  ++time_;
  Block* parent = found.empty() ? nullptr : found.back();
  auto index = static_cast<int64_t>(found.size());
  for (int& slot : slots) {
    last = PrefixBlockKey(last, TokensOf(query, index), hash_);
    parent = Store(query, last, parent, index++, &slot);
    if (parent == nullptr) break;
  }
  ReturnSlots(slots);
  slots.clear();
}

void PrefixCache::Return(const Blocks& found, const std::vector<int>& slots) {
  absl::MutexLock lock(&mu_);
  for (Block* block : found) LetGo(block);
  ReturnSlots(slots);
}

void PrefixCache::ReturnSlots(const std::vector<int>& slots) {
  for (const int slot : slots) {
    if (slot >= 0) free_slots_.insert(slot);
  }
}

PrefixCacheCounts PrefixCache::counts() const {
  absl::MutexLock lock(&mu_);
  PrefixCacheCounts counts = counts_;
  counts.num_slots = num_slots_;
  counts.used_slots = num_slots_ - static_cast<int64_t>(free_slots_.size());
  return counts;
}

PrefixLease& PrefixLease::operator=(PrefixLease&& other) noexcept {
  if (this == &other) return *this;
  Reset();
  cache_ = std::exchange(other.cache_, nullptr);
  tokens_ = std::move(other.tokens_);
  query_ = std::move(other.query_);
  query_.tokens = tokens_;
  blocks_ = std::move(other.blocks_);
  found_slots_ = std::move(other.found_slots_);
  num_found_ = std::exchange(other.num_found_, 0);
  last_key_ = other.last_key_;
  added_ = std::move(other.added_);
  return *this;
}

void PrefixLease::Reset() {
  if (cache_ == nullptr) return;
  cache_->Return(blocks_, added_);
  cache_ = nullptr;
  blocks_.clear();
  found_slots_.clear();
  added_.clear();
  num_found_ = 0;
}

void PrefixLease::Publish() {
  if (cache_ == nullptr) return;
  cache_->Publish(query_, blocks_, last_key_, added_);
}

}  // namespace prefilld::model
