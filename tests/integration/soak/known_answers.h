// Prompts whose answers were taken before the load, for comparison byte by byte.
#ifndef PREFILLD_TESTS_INTEGRATION_SOAK_KNOWN_ANSWERS_H_
#define PREFILLD_TESTS_INTEGRATION_SOAK_KNOWN_ANSWERS_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "client/prefill_client.h"

namespace prefilld::integration {

// The KV cache of one prompt as it arrives: every frame is put into its place. Thread-safe.
class ArrivingCache : public client::KvSink {
 public:
  // Each frame takes at least `delay`, so that the consumer is a slow one.
  explicit ArrivingCache(absl::Duration delay = absl::ZeroDuration()) : delay_(delay) {}

  absl::Status OnAccepted(const ::prefill::v1::Accepted& accepted) override;
  absl::Status OnProgress(const ::prefill::v1::Progress&) override { return absl::OkStatus(); }
  absl::Status OnFrame(const wire::ReceivedFrame& frame) override;

  bool accepted() const { return accepted_; }
  const std::string& bytes() const { return bytes_; }  // after the call

 private:
  const absl::Duration delay_;
  std::atomic<bool> accepted_ = false;
  uint32_t num_blocks_ = 0;
  size_t pair_bytes_ = 0;  // K and V of one block of one layer
  std::string bytes_;      // [num_layers, num_blocks, pair_bytes_]; frames never overlap
};

// Some prompts begin alike, so that the prefix cache has something to find, and there are more of
// them than fit into it. Thread-safe after construction.
class KnownAnswers {
 public:
  struct Ask {
    size_t prompt = 0;
    uint32_t lanes = 1;
    std::string id = "";
    std::string tenant = "";
    absl::Duration delay = absl::ZeroDuration();  // of each frame
    absl::Time deadline = absl::InfiniteFuture();
    client::Cancellation* cancellation = nullptr;
    bool bypass_prefix_cache = false;
  };

  // Asks the server for every answer, alone. Aborts when it gives none.
  KnownAnswers(const std::string& address, int64_t vocab_size);

  size_t size() const { return prompts_.size(); }
  ::prefill::v1::PrefillRequest Request(size_t prompt) const;

  // Asks again and compares. Every byte must be the same, unless tokens came from the prefix cache:
  // then the products of the others have other shapes, and elements may differ by what rounding
  // does. DATA_LOSS: an answer differs, and the message says where. Otherwise the status of the
  // call.
  absl::Status Check(client::PrefillClient& client, const Ask& ask) const;

  // The bytes that were compared so far, over all calls.
  int64_t compared_bytes() const { return compared_bytes_; }

 private:
  struct Answer {
    std::string bytes;
    uint32_t first_token = 0;
  };

  std::vector<std::vector<uint32_t>> prompts_;
  std::vector<Answer> answers_;
  mutable std::atomic<int64_t> compared_bytes_ = 0;
};

}  // namespace prefilld::integration

#endif  // PREFILLD_TESTS_INTEGRATION_SOAK_KNOWN_ANSWERS_H_
