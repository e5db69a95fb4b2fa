#include "tests/server/job_harness.h"

#include <utility>

#include <gtest/gtest.h>

#include "proto/wire/kv_layout.h"

namespace prefilld::server {

namespace v1 = ::prefill::v1;

PrefillWork WorkOf(const FakeEngine& engine, int num_tokens, const std::string& id) {
  v1::PrefillRequest request;
  request.set_request_id(id);
  for (int i = 0; i < num_tokens; ++i) request.add_token_ids(i % 250);
  RequestLimits limits;
  limits.engine = &engine.info();
  limits.attention.defaults.policy = model::AttentionPolicy::kDense;
  limits.max_lanes = 8;
  auto work = ValidateRequest(request, limits);
  EXPECT_TRUE(work.ok()) << work.status();
  return *std::move(work);
}

Consumer::Consumer(std::shared_ptr<PrefillJob> job, uint32_t lane)
    : job_(std::move(job)),
      lane_(lane),
      queue_(lane == 0 ? &job_->delivery().control() : *job_->delivery().side_lane(lane)) {
  queue_->Attach(this);
}

void Consumer::Send(Message message, bool last) {
  writing_ = true;
  if (auto* frame = std::get_if<KvFrame>(&message)) {
    v1::KvFrame& proto = *events_.emplace_back().mutable_kv_frame();
    proto.set_lane(frame->header.lane);
    proto.set_sequence(frame->header.sequence);
    proto.set_layer(frame->header.layer);
    proto.set_first_block(frame->header.first_block);
    proto.set_num_blocks(frame->header.num_blocks);
    proto.set_checksum(frame->header.checksum);
    proto.set_sent_at_us(frame->header.sent_at_us);
    proto.set_layers_computed(frame->header.layers_computed);
    proto.set_payload(frame->payload->data(), frame->payload_bytes);
  } else {
    events_.push_back(std::get<v1::PrefillEvent>(message));
  }
  message_ = std::move(message);
  if (!holds_still_) TakeOne();
}

void Consumer::GoOn() {
  holds_still_ = false;
  if (writing_) TakeOne();
}

void Consumer::TakeOne() {
  writing_ = false;
  message_ = Message();
  queue_->OnWriteDone(!cancelled_);
}

void Consumer::End(const absl::Status& status) {
  end_ = status;
  if (queue_ != &job_->delivery().control()) {
    if (status.ok()) job_->delivery().OnSideLaneDone(lane_);
  } else if (status.ok()) {
    job_->OnResultSent();
  }
}

std::vector<v1::KvFrame> Consumer::frames() const {
  std::vector<v1::KvFrame> frames;
  for (const auto& event : events_) {
    if (event.has_kv_frame()) frames.push_back(event.kv_frame());
  }
  return frames;
}

const v1::PrefillResult* Consumer::result() const {
  return !events_.empty() && events_.back().has_result() ? &events_.back().result() : nullptr;
}

int Consumer::num_progress() const {
  int count = 0;
  for (const auto& event : events_) count += event.has_progress() ? 1 : 0;
  return count;
}

Bench::Bench(const FakeEngineOptions& options, int num_buffers, int pack_threads,
             const std::vector<Tenant>& tenants)
    : engine(options),
      ring(*StagingRing::Create(engine, num_buffers, wire::KvPairBytes(WorkOf(engine, 1).layout),
                                absl::InfiniteDuration())),
      metrics(engine.info(), tenants),
      packer({.ring = *ring, .metrics = metrics, .progress = progress, .wake = wake},
             options.kv_slots, pack_threads),
      resources{.packer = packer,
                .metrics = metrics,
                .progress = progress,
                .clock = clock,
                .timeouts = {.min_consumer_bytes_per_s = 50e6}} {
  engine.set_clock(&clock);
}

std::shared_ptr<PrefillJob> Bench::NewJob(int num_tokens, const std::string& id) {
  return std::make_shared<PrefillJob>(WorkOf(engine, num_tokens, id), clock);
}

Bench::Shared Bench::NewShared(int num_tokens) {
  PrefillWork first = WorkOf(engine, num_tokens), other = first;
  first.layout.set_num_heads(1);
  first.num_receivers = 2;
  first.receiver_key = other.receiver_key = "key";
  other.layout.set_first_head(1);
  other.layout.set_num_heads(1);
  other.tokens.clear();
  other.receiver = 1;
  return {std::make_shared<PrefillJob>(std::move(first), clock),
          std::make_shared<PrefillJob>(std::move(other), clock)};
}

std::unique_ptr<PrefillPass> Bench::NewPass(std::vector<std::shared_ptr<PrefillJob>> jobs) {
  std::vector<model::PromptInput> prompts;
  for (const auto& job : jobs) {
    prompts.push_back({job->work().tokens, job->work().attention, job->work().prompt_logprobs});
  }
  auto sequence = engine.Start(prompts);
  EXPECT_TRUE(sequence.ok()) << sequence.status();
  return std::make_unique<PrefillPass>(resources, std::move(jobs), *std::move(sequence),
                                       engine.info().config.num_layers);
}

}  // namespace prefilld::server
