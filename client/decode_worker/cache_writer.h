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

// The type in which a cache is sent.
enum class WireKv : uint8_t { kAsCached, kFp8PerToken, kFp8PerBlock };

// Writes verified frames into the decoder's pool, at the blocks reserved for the sequence. Frames
// in fp8 become the pool's type here. Thread-safe: calls of Write run in parallel.
class CacheWriter {
 public:
  // `block_table` is borrowed. Frames must come in `layout`, which is one of LayoutFor(decoder).
  CacheWriter(model::Decoder* decoder, absl::Span<const int32_t> block_table,
              const ::prefill::v1::KvLayoutRequest& layout);

  // Checks that a cache fits the decoder. FAILED_PRECONDITION, with field, value and expectation:
  // it is not of the decoder's model, whatever its fingerprint says. Frames may be written only
  // after this returned OK.
  absl::Status CheckShape(const ::prefill::v1::KvLayout& layout) const;
  absl::Status Write(const wire::ReceivedFrame& frame);
  TransferReport report() const;
  // Returns the bytes that a token has in frames, over all layers.
  uint64_t bytes_per_token() const;

  // The layout in which this decoder's pool holds blocks, or the same in fp8.
  static ::prefill::v1::KvLayoutRequest LayoutFor(const model::Decoder& decoder, int block_tokens,
                                                  kernels::KvOrder order, WireKv wire_kv);

 private:
  absl::Status Store(const wire::ReceivedFrame& frame, absl::Span<const int32_t> blocks);
  absl::Status StoreScaled(const wire::ReceivedFrame& frame, absl::Span<const int32_t> blocks);
  void Count(const wire::ReceivedFrame& frame, absl::Time now);

  model::Decoder* const decoder_;
  const absl::Span<const int32_t> block_table_;
  const ::prefill::v1::KvLayout layout_;  // what it takes to know of one to read a payload

  mutable absl::Mutex mu_;
  TransferReport report_ ABSL_GUARDED_BY(mu_);
};

}  // namespace prefilld::client

#endif  // PREFILLD_CLIENT_DECODE_WORKER_CACHE_WRITER_H_
