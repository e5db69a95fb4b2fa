#ifndef PREFILLD_CLIENT_DECODE_WORKER_DECODE_LOOP_H_
#define PREFILLD_CLIENT_DECODE_WORKER_DECODE_LOOP_H_

#include <cstdint>
#include <deque>
#include <list>
#include <memory>
#include <optional>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_set.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/types/span.h"
#include "client/cancellation.h"
#include "model/decode/decoder.h"
#include "model/decode/sampling.h"

namespace prefilld::client {

// kPositions: the model has no position for the last token, so that none can follow it.
enum class Finish : uint8_t { kNo, kStop, kLength, kPositions };

// Tells when a generation is over.
struct StopRule {
  uint32_t max_new_tokens = 1;
  // How many tokens may be generated until one stands past the model's last position.
  int64_t tokens_to_positions_end = INT64_MAX;
  absl::flat_hash_set<uint32_t> stop_token_ids;

  // Tells how the generation ends after `num_tokens` generated tokens, the last of which is
  // token_id.
  Finish After(uint32_t token_id, uint32_t num_tokens) const;
};

// A sequence whose prompt is in the cache and whose first token is known.
struct DecodeRequest {
  uint32_t first_token = 0;
  int64_t num_prompt_tokens = 0;
  model::SamplingOptions sampling;
  StopRule stop;                          // says kNo to the first token
  absl::Span<const int32_t> block_table;  // borrowed while the stream lives
};

// Decodes any number of sequences on one thread, one step of each in turn, so that a long
// generation does not hold up the others. Thread-safe.
class DecodeLoop {
 private:
  struct Sequence;

 public:
  // The tokens of one sequence, for one thread. Once it is destroyed, the loop no longer touches
  // the block table. Must not outlive the loop.
  class Stream {
   public:
    ~Stream();
    Stream(const Stream&) = delete;
    Stream& operator=(const Stream&) = delete;

    // Waits for the next token and returns it, or nullopt after the last. Fails with CANCELLED or
    // the decoder's error.
    absl::StatusOr<std::optional<model::SampledToken>> Next();
    // Returns why the generation ended. Valid after the last token.
    Finish finish() const;

   private:
    friend class DecodeLoop;
    Stream(DecodeLoop* loop, const DecodeRequest& request, Cancellation* cancellation);

    DecodeLoop* const loop_;
    const std::unique_ptr<Sequence> sequence_;
    CancelHook cancel_hook_;
  };

  explicit DecodeLoop(model::Decoder* decoder);
  ~DecodeLoop();

  std::unique_ptr<Stream> Start(const DecodeRequest& request, Cancellation* cancellation);

 private:
  void Run();
  void StepOnce(Sequence& sequence) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  bool HasWork() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  model::Decoder* const decoder_;

  mutable absl::Mutex mu_;
  std::list<Sequence*> active_ ABSL_GUARDED_BY(mu_);  // the sequence whose step is next is in front
  const Sequence* stepping_ ABSL_GUARDED_BY(mu_) = nullptr;
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;

  std::thread thread_;
};

}  // namespace prefilld::client

#endif  // PREFILLD_CLIENT_DECODE_WORKER_DECODE_LOOP_H_
