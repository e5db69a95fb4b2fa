#include "client/decode_worker/decode_loop.h"

#include <utility>
#include <vector>

namespace prefilld::client {

Finish StopRule::After(uint32_t token_id, uint32_t num_tokens) const {
  if (stop_token_ids.contains(token_id)) return Finish::kStop;
  if (num_tokens >= max_new_tokens) return Finish::kLength;
  return num_tokens >= tokens_to_positions_end ? Finish::kPositions : Finish::kNo;
}

// The loop's mutex guards a sequence, except during the decoder's step.
struct DecodeLoop::Sequence {
  explicit Sequence(const DecodeRequest& request)
      : request(request), last_token(request.first_token) {}

  const DecodeRequest request;
  uint32_t last_token;
  uint32_t num_tokens = 1;  // generated, the first one included
  std::deque<model::SampledToken> ready;
  absl::Status status;
  Finish finish = Finish::kNo;

  bool ended() const { return !status.ok() || finish != Finish::kNo; }
};

DecodeLoop::Stream::Stream(DecodeLoop* loop, const DecodeRequest& request,
                           Cancellation* cancellation)
    : loop_(loop),
      sequence_(std::make_unique<Sequence>(request)),
      cancel_hook_(cancellation, [this] {
        absl::MutexLock lock(&loop_->mu_);
        if (!sequence_->ended()) sequence_->status = absl::CancelledError("cancelled");
      }) {
  absl::MutexLock lock(&loop_->mu_);
  loop_->active_.push_back(sequence_.get());
}

DecodeLoop::Stream::~Stream() {
  absl::MutexLock lock(&loop_->mu_);
  const auto idle = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(loop_->mu_) {
    return loop_->stepping_ != sequence_.get();
  };
  loop_->mu_.Await(absl::Condition(&idle));
  loop_->active_.remove(sequence_.get());
}

absl::StatusOr<std::optional<model::SampledToken>> DecodeLoop::Stream::Next() {
  absl::MutexLock lock(&loop_->mu_);
  const auto due = [this] { return !sequence_->ready.empty() || sequence_->ended(); };
  loop_->mu_.Await(absl::Condition(&due));
  if (!sequence_->status.ok()) return sequence_->status;
  if (sequence_->ready.empty()) return std::nullopt;
  model::SampledToken token = std::move(sequence_->ready.front());
  sequence_->ready.pop_front();
  return token;
}

Finish DecodeLoop::Stream::finish() const {
  absl::MutexLock lock(&loop_->mu_);
  return sequence_->finish;
}

DecodeLoop::DecodeLoop(model::Decoder* decoder) : decoder_(decoder), thread_([this] { Run(); }) {}

DecodeLoop::~DecodeLoop() {
  {
    absl::MutexLock lock(&mu_);
    stopping_ = true;
  }
  thread_.join();
}

std::unique_ptr<DecodeLoop::Stream> DecodeLoop::Start(const DecodeRequest& request,
                                                      Cancellation* cancellation) {
  return std::unique_ptr<Stream>(new Stream(this, request, cancellation));
}

bool DecodeLoop::HasWork() const { return stopping_ || !active_.empty(); }

void DecodeLoop::Run() {
  absl::MutexLock lock(&mu_);
  while (true) {
    mu_.Await(absl::Condition(this, &DecodeLoop::HasWork));
    if (stopping_) return;
    Sequence* sequence = active_.front();
    active_.pop_front();
    if (sequence->ended()) continue;
    StepOnce(*sequence);
    if (!sequence->ended()) active_.push_back(sequence);
    stepping_ = nullptr;  // from here on the stream may go
  }
}

void DecodeLoop::StepOnce(Sequence& sequence) {
  stepping_ = &sequence;
  const DecodeRequest& request = sequence.request;
  // Token i of those generated, counted from 1, stands at position prompt length + i - 1.
  const int64_t position = request.num_prompt_tokens + sequence.num_tokens - 1;
  mu_.Unlock();
  absl::StatusOr<std::vector<float>> logits =
      decoder_->Step(sequence.last_token, position, request.num_prompt_tokens, request.block_table);
  absl::StatusOr<model::SampledToken> token =
      logits.ok() ? model::Sample(*logits, request.sampling, position + 1)
                  : absl::StatusOr<model::SampledToken>(logits.status());
  mu_.Lock();
  if (sequence.ended()) return;  // cancelled meanwhile
  if (!token.ok()) {
    sequence.status = token.status();
    return;
  }
  sequence.last_token = token->token_id;
  ++sequence.num_tokens;
  sequence.finish = request.stop.After(token->token_id, sequence.num_tokens);
  sequence.ready.push_back(*std::move(token));
}

}  // namespace prefilld::client
