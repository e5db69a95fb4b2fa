#include "model/sparse/attention_parts.h"

#include <algorithm>

#include "kernels/attention_part.h"

namespace prefilld::model {

AttentionParts::AttentionParts(const DeviceTraits& device, const LayerPauses* pauses,
                               const kernels::AttentionParams& attention,
                               absl::Span<const kernels::HeadWork> work)
    : device_(device),
      most_work_(MostWorkBetweenPauses(device, pauses)),
      heads_at_once_(static_cast<size_t>(HeadsBetweenPauses(device, attention))),
      group_(attention),
      heads_left_(work) {}

bool AttentionParts::Next() {
  const bool is_first = group_.work == nullptr;
  if (blocks_left_ == 0) {
    if (heads_left_.empty()) return false;
    const auto group = heads_left_.subspan(0, heads_at_once_);
    heads_left_.remove_prefix(group.size());
    group_.work = group.data();
    group_.num_work = static_cast<int>(group.size());
    blocks_left_ = kernels::NumQueryBlocks(group_);
  }
  const int64_t all_blocks = kernels::NumQueryBlocks(group_);
  const int64_t end = blocks_left_;
  blocks_left_ -= BlocksBefore(end);
  if (end - blocks_left_ == all_blocks) {
    part_ = group_;
  } else {
    part_work_.resize(static_cast<size_t>(group_.num_work));
    part_ = kernels::PartOf(group_, blocks_left_, end, kernels::SizeOf(device_.compute_dtype),
                            part_work_.data());
  }
  is_all_ = is_first && is_last();
  return true;
}

bool AttentionParts::is_last() const { return blocks_left_ == 0 && heads_left_.empty(); }

// The longest rows of blocks come first. So what is left for the last part of a group, which may
// not fill the device, is short.
int64_t AttentionParts::BlocksBefore(int64_t end) const {
  const int64_t block_work =
      int64_t{group_.block_tokens} * group_.block_tokens * group_.head_dim;  // of a dense head
  int64_t halves = 0;
  for (int i = 0; i < group_.num_work; ++i) halves += group_.work[i].pattern == nullptr ? 2 : 1;
  const int64_t most_pairs = 2 * (most_work_ / block_work) / halves;  // of a query and a key block
  int64_t key_blocks = kernels::FirstQueryBlock(group_) + end;        // of the last row
  int64_t pairs = 0, blocks = 0;
  while (blocks < end && pairs + key_blocks <= most_pairs) {
    pairs += key_blocks--;
    ++blocks;
  }
  if (blocks == end) return end;
  // A part that fills the device so many times and a half takes as long as one that fills it once
  // more.
  const int64_t fillings = std::max<int64_t>(1, blocks * group_.num_work / device_.parallel_tiles);
  return std::clamp<int64_t>(fillings * device_.parallel_tiles / group_.num_work, 1, end);
}

}  // namespace prefilld::model
