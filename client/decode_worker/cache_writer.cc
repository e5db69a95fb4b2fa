#include "client/decode_worker/cache_writer.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "model/checkpoint/config.h"
#include "proto/status_macros.h"

namespace prefilld::client {

using ::prefill::v1::KvLayout;
using ::prefill::v1::KvLayoutRequest;

CacheWriter::CacheWriter(model::Decoder* decoder, absl::Span<const int32_t> block_table)
    : decoder_(decoder), block_table_(block_table) {}

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
  // gRPC delivers a message of this size in many slices, of which each goes straight to its place.
  const size_t tensor_bytes = frame.payload.size() / 2;
  const auto blocks = block_table_.subspan(frame.first_block, frame.num_blocks);
  const int layer = static_cast<int>(frame.layer);
  const int num_heads = decoder_->config().num_kv_heads;
  for (const bool is_value : {false, true}) {
    PREFILLD_RETURN_IF_ERROR(
        decoder_->StoreBlocks(layer, is_value, blocks, 0, num_heads,
                              frame.payload.Part(is_value ? tensor_bytes : 0, tensor_bytes)));
  }
  Count(frame, now);
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

TransferReport CacheWriter::report() const {
  absl::MutexLock lock(&mu_);
  return report_;
}

KvLayoutRequest CacheWriter::LayoutFor(const model::Decoder& decoder, int block_tokens,
                                       kernels::KvOrder order) {
  KvLayoutRequest layout;
  layout.set_block_tokens(block_tokens);
  layout.set_order(order == kernels::KvOrder::kNhd ? ::prefill::v1::KV_ORDER_NHD
                                                   : ::prefill::v1::KV_ORDER_HND);
  switch (decoder.kv_dtype()) {
    case kernels::DType::kBf16:
      layout.set_dtype(::prefill::v1::DTYPE_BF16);
      break;
    case kernels::DType::kFp16:
      layout.set_dtype(::prefill::v1::DTYPE_FP16);
      break;
    case kernels::DType::kFp32:
      layout.set_dtype(::prefill::v1::DTYPE_FP32);
      break;
  }
  return layout;
}

}  // namespace prefilld::client
