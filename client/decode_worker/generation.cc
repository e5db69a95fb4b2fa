#include "client/decode_worker/generation.h"

#include <algorithm>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "client/decode_worker/cache_writer.h"
#include "model/checkpoint/config.h"
#include "model/decode/sampling.h"
#include "proto/status_macros.h"
#include "proto/wire/request_id.h"

namespace prefilld::client {
namespace {

using ::prefill::v1::FinishReason;
using ::prefill::v1::GenerateEvent;
using ::prefill::v1::GenerateRequest;
using ::prefill::v1::GenerateResult;
using ::prefill::v1::PrefillRequest;
using ::prefill::v1::PrefillResult;
using ::prefill::v1::Progress;

uint64_t MicrosecondsSince(absl::Time start, absl::Time end) {
  return std::max<int64_t>(0, absl::ToInt64Microseconds(end - start));
}

model::SamplingOptions SamplingFrom(const ::prefill::v1::Sampling& sampling) {
  return {.temperature = sampling.temperature(),
          .top_k = sampling.top_k(),
          .top_p = sampling.top_p(),
          .seed = sampling.seed(),
          .top_logprobs = sampling.top_logprobs()};
}

void Fill(const model::SampledToken& token, ::prefill::v1::SampledToken& message) {
  message.set_token_id(token.token_id);
  message.set_logprob(token.logprob);
  for (const auto& [id, logprob] : token.top_logprobs) {
    auto* entry = message.add_top_logprobs();
    entry->set_token_id(id);
    entry->set_logprob(logprob);
  }
}

FinishReason ReasonFor(Finish finish) {
  switch (finish) {
    case Finish::kNo:
      return ::prefill::v1::FINISH_REASON_UNSPECIFIED;
    case Finish::kStop:
      return ::prefill::v1::FINISH_REASON_STOP;
    case Finish::kLength:
      return ::prefill::v1::FINISH_REASON_LENGTH;
    case Finish::kPositions:
      return ::prefill::v1::FINISH_REASON_POSITIONS;
  }
  return ::prefill::v1::FINISH_REASON_UNSPECIFIED;
}

int64_t BlocksNeeded(const WorkerContext& worker, const GenerateRequest& request) {
  const int64_t block_tokens = worker.options->decoder.block_tokens;
  const int64_t tokens = int64_t{request.token_ids_size()} + request.max_new_tokens();
  return (tokens + block_tokens - 1) / block_tokens;
}

// A request that finds the pool full may try again later. One that is larger than the pool never
// fits and is refused as invalid.
absl::Status CheckFitsPool(const WorkerContext& worker, const GenerateRequest& request) {
  if (BlocksNeeded(worker, request) <= worker.pool->num_blocks()) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("token_ids has ", request.token_ids_size(), " tokens and max_new_tokens is ",
                   request.max_new_tokens(), "; together at most ",
                   worker.pool->num_blocks() * worker.options->decoder.block_tokens,
                   " fit into this worker's KV pool"));
}

absl::Status ValidateRequest(const WorkerContext& worker, const GenerateRequest& request) {
  PREFILLD_RETURN_IF_ERROR(wire::CheckId("request_id", request.request_id()));
  PREFILLD_RETURN_IF_ERROR(wire::CheckId("pushed_transfer_id", request.pushed_transfer_id()));
  if (request.token_ids().empty()) {
    return absl::InvalidArgumentError("token_ids is empty; at least 1 is needed");
  }
  const int64_t positions = model::PositionLimit(worker.decoder->config());
  if (request.token_ids_size() > positions) {
    return absl::InvalidArgumentError(absl::StrCat("token_ids has ", request.token_ids_size(),
                                                   " tokens; the model has ", positions,
                                                   " positions"));
  }
  const int64_t vocab_size = worker.decoder->config().vocab_size;
  for (int i = 0; i < request.token_ids_size(); ++i) {
    if (request.token_ids(i) >= vocab_size) {
      return absl::InvalidArgumentError(absl::StrCat("token_ids[", i, "] is ", request.token_ids(i),
                                                     ", the vocabulary has ", vocab_size));
    }
  }
  const int64_t limit = worker.options->max_new_tokens_limit;
  if (request.max_new_tokens() < 1 || request.max_new_tokens() > limit) {
    return absl::InvalidArgumentError(
        absl::StrCat("max_new_tokens is ", request.max_new_tokens(), ", allowed: 1 to ", limit));
  }
  PREFILLD_RETURN_IF_ERROR(CheckFitsPool(worker, request));
  if (request.pushed_transfer_id().empty() && worker.prefill == nullptr) {
    return absl::FailedPreconditionError(
        "this worker calls no prefill server; pushed_transfer_id is needed");
  }
  return model::Validate(SamplingFrom(request.sampling()));
}

class Generation : public KvSink {
 public:
  Generation(const WorkerContext& worker, const GenerateRequest& request, const CallFacts& facts,
             Cancellation& cancellation, EventWriter& writer, KvReservation reservation)
      : worker_(worker),
        request_(request),
        facts_(facts),
        layout_(CacheWriter::LayoutFor(*worker.decoder, worker.options->decoder.block_tokens,
                                       worker.options->decoder.order, worker.options->wire_kv)),
        cancellation_(cancellation),
        writer_(writer),
        reservation_(std::move(reservation)),
        cache_(worker.decoder, reservation_.blocks(), layout_) {}

  absl::Status Run() {
    absl::StatusOr<PrefillResult> prefill =
        request_.pushed_transfer_id().empty() ? Pull() : AwaitPush();
    worker_.metrics->CountTransfer(cache_.report().kv_bytes, prefill.status());
    if (!prefill.ok()) return prefill.status();
    GenerateEvent event;
    *event.mutable_result()->mutable_prefill() = *std::move(prefill);
    PREFILLD_RETURN_IF_ERROR(Decode(*event.mutable_result()));
    return writer_.Write(event);
  }

  // This is KvSink's method. The client has compared the layout with the request's.
  absl::Status OnAccepted(const ::prefill::v1::Accepted& accepted) override {
    return cache_.CheckShape(accepted.layout());
  }
  absl::Status OnFrame(const wire::ReceivedFrame& frame) override { return cache_.Write(frame); }
  void OnSharedMemory(const absl::Status& attached) override {
    worker_.metrics->CountPull(attached);
  }
  absl::Status OnProgress(const Progress& progress) override {
    GenerateEvent event;
    *event.mutable_progress()->mutable_progress() = progress;
    event.mutable_progress()->set_kv_bytes(cache_.report().kv_bytes);
    return writer_.Write(event);
  }

 private:
  absl::Status WriteStarted() {
    GenerateEvent event;
    auto& started = *event.mutable_started();
    started.set_request_id(facts_.request_id);
    started.set_kv_blocks(static_cast<uint32_t>(reservation_.blocks().size()));
    *started.mutable_kv_layout() = layout_;
    started.set_model_fingerprint(worker_.decoder->fingerprint());
    started.set_vocab_size(static_cast<uint32_t>(worker_.decoder->config().vocab_size));
    started.set_num_layers(static_cast<uint32_t>(worker_.decoder->config().num_layers));
    return writer_.Write(event);
  }

  absl::StatusOr<PrefillResult> Pull() {
    PREFILLD_RETURN_IF_ERROR(WriteStarted());
    PrefillRequest prefill;
    prefill.set_request_id(facts_.request_id);
    prefill.set_model_fingerprint(worker_.decoder->fingerprint());
    *prefill.mutable_token_ids() = request_.token_ids();
    *prefill.mutable_layout() = layout_;
    *prefill.mutable_sampling() = request_.sampling();
    *prefill.mutable_attention() = request_.attention();
    prefill.set_num_lanes(worker_.options->lanes);
    prefill.set_priority(request_.priority());
    return worker_.prefill->Prefill(prefill, *this,
                                    {.deadline = facts_.deadline,
                                     .cancellation = &cancellation_,
                                     .metadata = facts_.trace.Metadata(),
                                     .resumable = true,
                                     .kv_bytes_per_token = cache_.bytes_per_token()});
  }

  absl::StatusOr<PrefillResult> AwaitPush() {
    const std::string& id = request_.pushed_transfer_id();
    const auto transfer = std::make_shared<PendingTransfer>(
        ExpectedTransfer{layout_, static_cast<uint32_t>(request_.token_ids_size()),
                         worker_.decoder->fingerprint()},
        &cache_, worker_.options->push_resume_window);
    PREFILLD_RETURN_IF_ERROR(worker_.transfers->Register(id, transfer));
    CancelHook hook(&cancellation_,
                    [&transfer] { transfer->Abandon(absl::CancelledError("cancelled")); });
    // The router may have the cache sent only from now on.
    const absl::Status status = WriteStarted();
    absl::StatusOr<PrefillResult> result =
        status.ok()
            ? transfer->Await(worker_.options->transfer_timeout, [this] { return ReportPush(); })
            : status;
    transfer->Abandon(absl::CancelledError("the request that waited for this cache has ended"));
    worker_.transfers->Unregister(id, worker_.options->push_resume_window);
    return result;
  }

  // Reports the progress that the frames tell. prefilld's own reports go to the caller that had the
  // cache pushed.
  absl::Status ReportPush() {
    Progress progress;
    progress.set_layers_computed(cache_.report().layers_computed);
    progress.set_num_layers(worker_.decoder->config().num_layers);
    progress.set_elapsed_us(MicrosecondsSince(facts_.arrival, absl::Now()));
    return OnProgress(progress);
  }

  StopRule MakeStopRule() const {
    StopRule rule;
    rule.max_new_tokens = request_.max_new_tokens();
    // The first token stands behind the prompt, at position token_ids_size.
    const int64_t positions = model::PositionLimit(worker_.decoder->config());
    rule.tokens_to_positions_end = positions - request_.token_ids_size() + 1;
    rule.stop_token_ids.insert(request_.stop_token_ids().begin(), request_.stop_token_ids().end());
    if (!request_.ignore_eos()) {
      const auto& eos = worker_.decoder->config().eos_token_ids;
      rule.stop_token_ids.insert(eos.begin(), eos.end());
    }
    return rule;
  }

  absl::Status WriteToken(const ::prefill::v1::SampledToken& token, uint32_t index) {
    GenerateEvent event;
    *event.mutable_token()->mutable_token() = token;
    event.mutable_token()->set_index(index);
    worker_.metrics->CountToken();
    return writer_.Write(event);
  }

  absl::Status Decode(GenerateResult& result) {
    const absl::Time first_token_at = absl::Now();
    worker_.metrics->ObserveTimeToFirstToken(first_token_at - facts_.arrival);
    const auto& first_token = result.prefill().first_token();
    if (first_token.token_id() >= worker_.decoder->config().vocab_size) {
      return absl::DataLossError(absl::StrCat("the prefill's first token is ",
                                              first_token.token_id(), ", the vocabulary has ",
                                              worker_.decoder->config().vocab_size));
    }
    PREFILLD_RETURN_IF_ERROR(WriteToken(first_token, 0));

    DecodeRequest decode;
    decode.first_token = first_token.token_id();
    decode.num_prompt_tokens = request_.token_ids_size();
    decode.sampling = SamplingFrom(request_.sampling());
    decode.stop = MakeStopRule();
    decode.block_table = reservation_.blocks();
    uint32_t num_tokens = 1;
    Finish finish = decode.stop.After(decode.first_token, num_tokens);
    if (finish == Finish::kNo) {
      const auto stream = worker_.loop->Start(decode, &cancellation_);
      while (true) {
        PREFILLD_ASSIGN_OR_RETURN(const auto token, stream->Next());
        if (!token.has_value()) break;
        ::prefill::v1::SampledToken message;
        Fill(*token, message);
        PREFILLD_RETURN_IF_ERROR(WriteToken(message, num_tokens++));
      }
      finish = stream->finish();
    }
    result.set_finish_reason(ReasonFor(finish));
    result.set_num_tokens(num_tokens);
    result.set_ttft_us(MicrosecondsSince(facts_.arrival, first_token_at));
    result.set_decode_us(MicrosecondsSince(first_token_at, absl::Now()));
    FillTransfer(result);
    return absl::OkStatus();
  }

  void FillTransfer(GenerateResult& result) const {
    const TransferReport report = cache_.report();
    result.set_kv_bytes(report.kv_bytes);
    if (report.kv_bytes == 0) return;
    result.set_kv_transfer_us(MicrosecondsSince(report.first_frame, report.last_frame));
    result.set_kv_overlap(static_cast<double>(report.overlapped_bytes) /
                          static_cast<double>(report.kv_bytes));
    result.set_first_frame_us(MicrosecondsSince(facts_.arrival, report.first_frame_of_layer_0));
    result.set_layers_computed_at_first_frame(report.layers_computed_at_first_frame);
  }

  const WorkerContext& worker_;
  const GenerateRequest& request_;
  const CallFacts& facts_;
  const ::prefill::v1::KvLayoutRequest layout_;
  Cancellation& cancellation_;
  EventWriter& writer_;

  KvReservation reservation_;
  CacheWriter cache_;
};

}  // namespace

absl::Status Generate(const WorkerContext& worker, const GenerateRequest& request,
                      const CallFacts& facts, Cancellation& cancellation, EventWriter& writer) {
  PREFILLD_RETURN_IF_ERROR(ValidateRequest(worker, request));
  PREFILLD_ASSIGN_OR_RETURN(KvReservation reservation,
                            worker.pool->Reserve(BlocksNeeded(worker, request)));
  Generation generation(worker, request, facts, cancellation, writer, std::move(reservation));
  return generation.Run();
}

}  // namespace prefilld::client
