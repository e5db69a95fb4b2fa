#include "client/decode_worker/cache_writer.h"

#include <algorithm>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "client/decode_worker/scaled_elements.h"
#include "model/checkpoint/config.h"
#include "proto/status_macros.h"
#include "proto/wire/kv_layout.h"

namespace prefilld::client {

using ::prefill::v1::KvLayout;
using ::prefill::v1::KvLayoutRequest;

namespace {

KvLayout PayloadLayout(const model::ModelConfig& config, const KvLayoutRequest& request) {
  KvLayout layout;
  layout.set_dtype(request.dtype());
  layout.set_order(request.order());
  layout.set_block_tokens(request.block_tokens());
  layout.set_num_heads(config.num_kv_heads);
  layout.set_head_dim(config.head_dim);
  layout.set_scales(request.scales());
  return layout;
}

::prefill::v1::DType CachedType(const model::Decoder& decoder) {
  return decoder.kv_dtype() == kernels::DType::kBf16   ? ::prefill::v1::DTYPE_BF16
         : decoder.kv_dtype() == kernels::DType::kFp16 ? ::prefill::v1::DTYPE_FP16
                                                       : ::prefill::v1::DTYPE_FP32;
}

}  // namespace

CacheWriter::CacheWriter(model::Decoder* decoder, absl::Span<const int32_t> block_table,
                         const KvLayoutRequest& layout)
    : decoder_(decoder),
      block_table_(block_table),
      layout_(PayloadLayout(decoder->config(), layout)) {}

// The decoder takes as many bytes per block as its own shape has. A sender that promises smaller
// blocks would make it read past the end of the payload.
absl::Status CacheWriter::CheckShape(const KvLayout& layout) const {
  const model::ModelConfig& config = decoder_->config();
  const auto expect = [](const char* field, uint32_t value, int64_t expected) {
    if (value == expected) return absl::OkStatus();
    return absl::FailedPreconditionError(
        absl::StrCat("KV layout: ", field, " is ", value, ", the decoder's model has ", expected));
  };
  absl::Status status = expect("num_layers", layout.num_layers(), config.num_layers);
  status.Update(expect("num_kv_heads", layout.num_kv_heads(), config.num_kv_heads));
  status.Update(expect("head_dim", layout.head_dim(), config.head_dim));
  return status;
}

absl::Status CacheWriter::Write(const wire::ReceivedFrame& frame) {
  const absl::Time now = absl::Now();
  if (uint64_t{frame.first_block} + frame.num_blocks > block_table_.size()) {
    return absl::InternalError(absl::StrCat("blocks up to ", frame.first_block + frame.num_blocks,
                                            " of a sequence with ", block_table_.size()));
  }
  const auto blocks = block_table_.subspan(frame.first_block, frame.num_blocks);
  PREFILLD_RETURN_IF_ERROR(wire::HasScales(layout_.dtype()) ? StoreScaled(frame, blocks)
                                                            : Store(frame, blocks));
  Count(frame, now);
  return absl::OkStatus();
}

// gRPC delivers a message of this size in many slices, of which each goes straight to its place.
absl::Status CacheWriter::Store(const wire::ReceivedFrame& frame,
                                absl::Span<const int32_t> blocks) {
  const size_t tensor_bytes = frame.payload.size() / 2;
  for (const bool is_value : {false, true}) {
    PREFILLD_RETURN_IF_ERROR(decoder_->StoreBlocks(
        static_cast<int>(frame.layer), is_value, blocks, 0, decoder_->config().num_kv_heads,
        frame.payload.Part(is_value ? tensor_bytes : 0, tensor_bytes)));
  }
  return absl::OkStatus();
}

// The scales lie at the payload's end, so the slices are put together first.
absl::Status CacheWriter::StoreScaled(const wire::ReceivedFrame& frame,
                                      absl::Span<const int32_t> blocks) {
  std::vector<uint8_t> scratch;
  const uint8_t* payload = frame.payload.Contiguous(scratch);
  std::vector<uint8_t> cached(blocks.size() * decoder_->block_bytes());
  for (const bool is_value : {false, true}) {
    Unscale(layout_, frame.num_blocks, is_value, payload, decoder_->kv_dtype(), cached.data());
    PREFILLD_RETURN_IF_ERROR(decoder_->StoreBlocks(static_cast<int>(frame.layer), is_value, blocks,
                                                   0, decoder_->config().num_kv_heads,
                                                   {absl::MakeConstSpan(cached)}));
  }
  return absl::OkStatus();
}

void CacheWriter::Count(const wire::ReceivedFrame& frame, absl::Time now) {
  absl::MutexLock lock(&mu_);
  const uint64_t bytes = frame.payload.size();
  report_.kv_bytes += bytes;
  if (frame.layers_computed < static_cast<uint32_t>(decoder_->config().num_layers)) {
    report_.overlapped_bytes += bytes;
  }
  report_.layers_computed = std::max(report_.layers_computed, frame.layers_computed);
  report_.first_frame = std::min(report_.first_frame, now);
  report_.last_frame = std::max(report_.last_frame, now);
  if (frame.layer == 0 && now < report_.first_frame_of_layer_0) {
    report_.first_frame_of_layer_0 = now;
    report_.layers_computed_at_first_frame = frame.layers_computed;
  }
}

uint64_t CacheWriter::bytes_per_token() const {
  return static_cast<uint64_t>(decoder_->config().num_layers * wire::KvPairBytes(layout_) /
                               layout_.block_tokens());
}

TransferReport CacheWriter::report() const {
  absl::MutexLock lock(&mu_);
  return report_;
}

KvLayoutRequest CacheWriter::LayoutFor(const model::Decoder& decoder, int block_tokens,
                                       kernels::KvOrder order, WireKv wire_kv) {
  KvLayoutRequest layout;
  layout.set_block_tokens(block_tokens);
  layout.set_order(order == kernels::KvOrder::kNhd ? ::prefill::v1::KV_ORDER_NHD
                                                   : ::prefill::v1::KV_ORDER_HND);
  if (wire_kv == WireKv::kAsCached) {
    layout.set_dtype(CachedType(decoder));
  } else {
    layout.set_dtype(::prefill::v1::DTYPE_FP8_E4M3);
    layout.set_scales(wire_kv == WireKv::kFp8PerBlock ? ::prefill::v1::KV_SCALES_PER_BLOCK
                                                      : ::prefill::v1::KV_SCALES_PER_TOKEN);
  }
  return layout;
}

}  // namespace prefilld::client
