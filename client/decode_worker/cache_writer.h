#ifndef PREFILLD_CLIENT_DECODE_WORKER_CACHE_WRITER_H_
#define PREFILLD_CLIENT_DECODE_WORKER_CACHE_WRITER_H_

#include <cstdint>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "model/decode/decoder.h"
#include "prefill/v1/kv.pb.h"
#include "proto/wire/frame_codec.h"

namespace prefilld::client {

// The course of one cache's arrival.
struct TransferReport {
  uint64_t kv_bytes = 0;
  // Bytes whose frames were sent before prefilld had finished its last layer.
  uint64_t overlapped_bytes = 0;
  uint32_t layers_computed = 0;  // the most that any frame has told
  absl::Time first_frame = absl::InfiniteFuture();
  absl::Time last_frame = absl::InfinitePast();
  absl::Time first_frame_of_layer_0 = absl::InfiniteFuture();
  uint32_t layers_computed_at_first_frame = 0;
};

// Writes verified frames into the decoder's pool, at the blocks reserved for the sequence.
// Thread-safe: calls of Write run in parallel.
class CacheWriter {
 public:
  // `block_table` is borrowed. Frames must come in the layout that LayoutFor(decoder) asks for.
  CacheWriter(model::Decoder* decoder, absl::Span<const int32_t> block_table);

  // Checks that a cache fits the decoder. FAILED_PRECONDITION, with field, value and expectation:
  // it is not of the decoder's model, whatever its fingerprint says. Frames may be written only
  // after this returned OK.
  absl::Status CheckShape(const ::prefill::v1::KvLayout& layout) const;
  absl::Status Write(const wire::ReceivedFrame& frame);
  TransferReport report() const;

  // The layout in which this decoder's pool holds blocks.
  static ::prefill::v1::KvLayoutRequest LayoutFor(const model::Decoder& decoder, int block_tokens,
                                                  kernels::KvOrder order);

 private:
  void Count(const wire::ReceivedFrame& frame, absl::Time now);

  model::Decoder* const decoder_;
  const absl::Span<const int32_t> block_table_;

  mutable absl::Mutex mu_;
  TransferReport report_ ABSL_GUARDED_BY(mu_);
};

}  // namespace prefilld::client

#endif  // PREFILLD_CLIENT_DECODE_WORKER_CACHE_WRITER_H_
