#include "client/transfer_check.h"

#include <algorithm>
#include <numeric>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "google/protobuf/descriptor.h"
#include "google/protobuf/generated_enum_reflection.h"
#include "proto/status_macros.h"
#include "proto/wire/kv_layout.h"

namespace prefilld::client {
namespace {

using ::prefill::v1::DType;
using ::prefill::v1::KvLayout;
using ::prefill::v1::KvLayoutRequest;
using ::prefill::v1::KvOrder;
using ::prefill::v1::KvScales;
using ::prefill::v1::PrefillResult;

// No model comes near this limit. It keeps the memory that a transfer takes in proportion to its
// prompt, whatever the sender claims.
constexpr uint32_t kMaxLayers = 1024;

// A frame that arrives damaged more often is not asked for once more.
constexpr int kMaxDamagedCopies = 3;

template <typename T, typename E>
absl::Status Expect(const char* field, const T& value, const E& expected) {
  if (value == expected) return absl::OkStatus();
  return absl::FailedPreconditionError(
      absl::StrCat("KV layout: ", field, " is ", value, ", expected ", expected));
}

// Returns a value's name, or its number if this version does not know it.
template <typename Enum>
std::string Name(Enum value) {
  const auto* known = google::protobuf::GetEnumDescriptor<Enum>()->FindValueByNumber(value);
  return known == nullptr ? absl::StrCat(static_cast<int>(value)) : std::string(known->name());
}

uint32_t Or(uint32_t wish, uint32_t otherwise) { return wish == 0 ? otherwise : wish; }

absl::Status CheckConsistent(const KvLayout& layout) {
  const auto refuse = [](const char* field, const absl::AlphaNum& value,
                         absl::string_view allowed) {
    return absl::FailedPreconditionError(
        absl::StrCat("KV layout: ", field, " is ", value, ", allowed: ", allowed));
  };
  if (wire::BytesPerElement(layout.dtype()) == 0) {
    return refuse("dtype", Name(layout.dtype()), wire::kKvDTypesList);
  }
  if (wire::HasScales(layout.dtype())) {
    if (!wire::IsKvScales(layout.scales())) {
      return refuse("scales", Name(layout.scales()), wire::kKvScalesList);
    }
  } else if (layout.scales() != KvScales::KV_SCALES_UNSPECIFIED) {
    return refuse("scales", Name(layout.scales()),
                  absl::StrCat("none in dtype ", DType_Name(layout.dtype())));
  }
  if (!wire::IsKvOrder(layout.order())) {
    return refuse("order", Name(layout.order()), wire::kKvOrdersList);
  }
  const uint32_t block = layout.block_tokens();
  if (!wire::IsBlockTokens(block)) {
    return refuse("block_tokens", block, wire::kBlockTokensList);
  }
  if (layout.num_layers() < 1 || layout.num_layers() > kMaxLayers) {
    return refuse("num_layers", layout.num_layers(), absl::StrCat("1 to ", kMaxLayers));
  }
  if (layout.head_dim() < 1 || layout.head_dim() > 1024) {
    return refuse("head_dim", layout.head_dim(), "1 to 1024");
  }
  if (layout.num_kv_heads() < 1 || layout.num_kv_heads() > 1024) {
    return refuse("num_kv_heads", layout.num_kv_heads(), "1 to 1024");
  }
  if (layout.num_heads() < 1 || layout.first_head() >= layout.num_kv_heads() ||
      layout.num_heads() > layout.num_kv_heads() - layout.first_head()) {
    return refuse("num_heads", layout.num_heads(),
                  absl::StrCat("1 to num_kv_heads ", layout.num_kv_heads(), " - first_head ",
                               layout.first_head()));
  }
  const uint64_t num_blocks = (uint64_t{layout.num_tokens()} + block - 1) / block;
  if (layout.num_blocks() != num_blocks) {
    return refuse("num_blocks", layout.num_blocks(),
                  absl::StrCat(num_blocks, " for ", layout.num_tokens(), " tokens"));
  }
  if (layout.first_block() > num_blocks) {
    return refuse("first_block", layout.first_block(), absl::StrCat("0 to ", num_blocks));
  }
  if (!layout.keys_rotated()) return refuse("keys_rotated", 0, "1");
  return absl::OkStatus();
}

}  // namespace

absl::Status CheckLayout(const KvLayout& layout, const ExpectedTransfer& expected) {
  const KvLayoutRequest& wish = expected.layout;
  // This check comes first because num_tokens bounds what the other fields may ask us to allocate.
  PREFILLD_RETURN_IF_ERROR(Expect("num_tokens", layout.num_tokens(), expected.num_tokens));
  PREFILLD_RETURN_IF_ERROR(CheckConsistent(layout));
  if (!expected.model_fingerprint.empty()) {
    PREFILLD_RETURN_IF_ERROR(
        Expect("model_fingerprint", layout.model_fingerprint(), expected.model_fingerprint));
  }
  PREFILLD_RETURN_IF_ERROR(Expect("block_tokens", layout.block_tokens(),
                                  Or(wish.block_tokens(), wire::kDefaultBlockTokens)));
  const KvOrder order =
      wish.order() == KvOrder::KV_ORDER_UNSPECIFIED ? KvOrder::KV_ORDER_NHD : wish.order();
  PREFILLD_RETURN_IF_ERROR(Expect("order", KvOrder_Name(layout.order()), KvOrder_Name(order)));
  if (wish.dtype() != DType::DTYPE_UNSPECIFIED) {
    PREFILLD_RETURN_IF_ERROR(Expect("dtype", DType_Name(layout.dtype()), DType_Name(wish.dtype())));
  }
  if (wire::HasScales(layout.dtype())) {
    const KvScales scales = wish.scales() == KvScales::KV_SCALES_UNSPECIFIED
                                ? KvScales::KV_SCALES_PER_TOKEN
                                : wish.scales();
    PREFILLD_RETURN_IF_ERROR(
        Expect("scales", KvScales_Name(layout.scales()), KvScales_Name(scales)));
  }
  PREFILLD_RETURN_IF_ERROR(Expect("first_head", layout.first_head(), wish.first_head()));
  PREFILLD_RETURN_IF_ERROR(
      Expect("num_heads", layout.num_heads(),
             Or(wish.num_heads(), layout.num_kv_heads() - layout.first_head())));
  return Expect("first_block", layout.first_block(), wish.first_block());
}

TransferCheck::TransferCheck(const KvLayout& layout, uint32_t num_lanes, bool resumable)
    : resumable_(resumable),
      layout_(layout),
      pair_bytes_(wire::KvPairBytes(layout)),
      frames_per_lane_(num_lanes),
      damaged_(num_lanes),
      arrived_(size_t{layout.num_layers()} * layout.num_blocks()),
      blocks_missing_(uint64_t{layout.num_layers()} *
                      (layout.num_blocks() - layout.first_block())) {}

absl::StatusOr<TransferCheck::Arrival> TransferCheck::Check(uint32_t lane,
                                                            const wire::ReceivedFrame& frame) {
  PREFILLD_RETURN_IF_ERROR(CheckPlace(lane, frame));
  const uint64_t checksum = frame.payload.Checksum();
  absl::MutexLock lock(&mu_);
  auto& damaged = damaged_[lane];
  const auto awaited_again = damaged.find(frame.sequence);
  const bool is_next = frame.sequence == frames_per_lane_[lane];
  if (resumable_ && !is_next && awaited_again == damaged.end() &&
      frame.sequence < frames_per_lane_[lane]) {
    if (HasArrived(frame)) return Arrival::kAgain;
    return absl::DataLossError(absl::StrCat(
        "lane ", lane, ": frame ", frame.sequence, " has arrived, and comes with blocks that have ",
        "not: layer ", frame.layer, ", blocks from ", frame.first_block));
  }
  if (checksum != frame.checksum) {
    // Each brings a block that is missing, so no more of them are awaited than blocks are.
    uint64_t num_damaged = 0;
    for (const auto& of_lane : damaged_) num_damaged += of_lane.size();
    const bool may_be_repaired = resumable_ && (awaited_again != damaged.end() ||
                                                (is_next && num_damaged < blocks_missing_));
    if (may_be_repaired) {
      if (++damaged[frame.sequence] <= kMaxDamagedCopies) {
        if (is_next) ++frames_per_lane_[lane];
        return Arrival::kDamaged;
      }
      is_beyond_repair_ = true;
    }
    return absl::DataLossError(absl::StrFormat(
        "lane %u, frame %u (layer %u, blocks from %u): checksum of the payload is %016x, sent "
        "was %016x",
        lane, frame.sequence, frame.layer, frame.first_block, checksum, frame.checksum));
  }
  PREFILLD_RETURN_IF_ERROR(MarkArrived(lane, frame));
  return Arrival::kNew;
}

bool TransferCheck::is_beyond_repair() const {
  absl::MutexLock lock(&mu_);
  return is_beyond_repair_;
}

uint64_t TransferCheck::received(uint32_t lane) const {
  absl::MutexLock lock(&mu_);
  return damaged_[lane].empty() ? frames_per_lane_[lane] : damaged_[lane].begin()->first;
}

absl::Status TransferCheck::CheckPlace(uint32_t lane, const wire::ReceivedFrame& frame) const {
  if (frame.lane != lane) {
    return absl::DataLossError(
        absl::StrCat("a frame of lane ", frame.lane, " arrived on lane ", lane));
  }
  const uint64_t end = uint64_t{frame.first_block} + frame.num_blocks;
  if (frame.layer >= layout_.num_layers() || frame.num_blocks == 0 ||
      frame.first_block < layout_.first_block() || end > layout_.num_blocks()) {
    return absl::DataLossError(absl::StrCat(
        "lane ", lane, ", frame ", frame.sequence, ": layer ", frame.layer, ", blocks ",
        frame.first_block, " to ", end, " are outside the layout (", layout_.num_layers(),
        " layers, blocks ", layout_.first_block(), " to ", layout_.num_blocks(), ")"));
  }
  const uint64_t size = frame.num_blocks * pair_bytes_;
  if (frame.payload.size() != size) {
    return absl::DataLossError(absl::StrCat("lane ", lane, ", frame ", frame.sequence,
                                            ": payload of ", frame.payload.size(), " bytes, ",
                                            frame.num_blocks, " blocks have ", size));
  }
  return absl::OkStatus();
}

bool TransferCheck::HasArrived(const wire::ReceivedFrame& frame) const {
  const auto first = arrived_.begin() + static_cast<int64_t>(frame.layer) * layout_.num_blocks() +
                     frame.first_block;
  return std::all_of(first, first + frame.num_blocks, [](bool arrived) { return arrived; });
}

absl::Status TransferCheck::MarkArrived(uint32_t lane, const wire::ReceivedFrame& frame) {
  const bool is_next = frame.sequence == frames_per_lane_[lane];
  if (!is_next && damaged_[lane].count(frame.sequence) == 0) {
    return absl::DataLossError(absl::StrCat("lane ", lane, ": frame ", frame.sequence,
                                            " arrived where ", frames_per_lane_[lane], " was due"));
  }
  // Nothing is marked of a frame that is refused, because the right one may come in its place.
  const auto first = arrived_.begin() + static_cast<int64_t>(frame.layer) * layout_.num_blocks() +
                     frame.first_block;
  const auto end = first + frame.num_blocks;
  const auto before = std::find(first, end, true);
  if (before != end) {
    return absl::DataLossError(
        absl::StrCat("lane ", lane, ", frame ", frame.sequence, ": layer ", frame.layer, ", block ",
                     frame.first_block + (before - first), " arrived before"));
  }
  std::fill(first, end, true);
  if (is_next) ++frames_per_lane_[lane];
  damaged_[lane].erase(frame.sequence);
  blocks_missing_ -= frame.num_blocks;
  bytes_ += frame.payload.size();
  return absl::OkStatus();
}

absl::Status TransferCheck::Finish(const PrefillResult& result) const {
  absl::MutexLock lock(&mu_);
  const size_t lanes = std::max<size_t>(frames_per_lane_.size(), result.frames_per_lane_size());
  for (size_t lane = 0; lane < lanes; ++lane) {
    const uint64_t arrived = lane < frames_per_lane_.size() ? frames_per_lane_[lane] : 0;
    const uint64_t sent = lane < static_cast<size_t>(result.frames_per_lane_size())
                              ? result.frames_per_lane(static_cast<int>(lane))
                              : 0;
    if (arrived != sent) {
      return absl::DataLossError(
          absl::StrCat("lane ", lane, ": ", arrived, " frames arrived of ", sent, " sent"));
    }
  }
  if (blocks_missing_ > 0) {
    return absl::DataLossError(absl::StrCat(
        blocks_missing_, " blocks were never sent, though the server says it is done"));
  }
  return absl::OkStatus();
}

uint64_t TransferCheck::frames() const {
  absl::MutexLock lock(&mu_);
  return std::accumulate(frames_per_lane_.begin(), frames_per_lane_.end(), uint64_t{0});
}

uint64_t TransferCheck::bytes() const {
  absl::MutexLock lock(&mu_);
  return bytes_;
}

}  // namespace prefilld::client
