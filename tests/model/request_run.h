// Takes prompts and batches through an engine step by step, so that tests can let them take turns,
// and keeps everything that comes out.
#ifndef PREFILLD_TESTS_MODEL_REQUEST_RUN_H_
#define PREFILLD_TESTS_MODEL_REQUEST_RUN_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/functional/function_ref.h"
#include "model/prefill/prefill_engine.h"

namespace prefilld::model {

// A prompt or a batch of prompts, with its options.
struct Request {
  std::vector<std::vector<uint32_t>> prompts;
  AttentionOptions attention;
  bool logprobs = false;

  std::vector<PromptInput> inputs() const;
};

// Makes requests of random tokens, none like another.
class RequestMaker {
 public:
  explicit RequestMaker(int64_t vocab_size) : vocab_size_(vocab_size) {}

  Request One(int64_t length, const AttentionOptions& attention, bool logprobs = false);
  Request Batch(const std::vector<int64_t>& lengths, bool logprobs = false);

 private:
  const int64_t vocab_size_;
  uint64_t prompts_ = 0;
};

// Options under which heads of one cluster share a pattern that leaves much out.
AttentionOptions Share();

// All results of a request.
struct Outcome {
  std::vector<std::vector<uint8_t>> kv;  // [num_layers * prompts], as packed
  std::vector<std::vector<int>> heads;   // [num_layers]: dense, pivot, shared, …
  std::vector<double> density;           // [num_layers]
  std::vector<std::vector<float>> logits;
  std::vector<std::vector<float>> logprobs;  // of the tokens and of the likeliest, prompt by prompt
};

// Takes a request through the engine step by step. Its consumer is slow: a layer's KV is packed as
// late as the slots allow, or when a test asks for it. A failure fails the test.
class Runner {
 public:
  Runner(PrefillEngine& engine, const Request& request);

  bool done() const { return sequence_ == nullptr; }
  PrefillSequence& sequence() { return *sequence_; }
  int unreleased() const { return num_layers_ - num_packed_; }

  // Computes a layer, or after the last one the logits, and then log-probabilities prompt by
  // prompt and part by part.
  void Step(absl::FunctionRef<bool()> at_point = [] { return true; });
  void RunLayer(absl::FunctionRef<bool()> at_point = [] { return true; });
  void PackOldest();

  Outcome outcome;
  std::vector<LayerReport> reports;

 private:
  PrefillEngine& engine_;
  const Request request_;
  std::unique_ptr<PrefillSequence> sequence_;
  int num_layers_ = 0;
  int num_packed_ = 0;
  size_t prompt_ = 0;  // whose log-probabilities come next
};

// Runs a request while no other is under way.
Outcome Alone(PrefillEngine& engine, const Request& request);

void ExpectSame(const Outcome& actual, const Outcome& expected);

}  // namespace prefilld::model

#endif  // PREFILLD_TESTS_MODEL_REQUEST_RUN_H_
