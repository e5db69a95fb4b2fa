#include <unistd.h>

#include <cstdio>
#include <memory>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "client/cli/commands.h"
#include "client/cli/progress_line.h"
#include "client/cli/prompt.h"
#include "client/cli/summary.h"
#include "grpcpp/channel.h"
#include "grpcpp/client_context.h"
#include "nlohmann/json.hpp"
#include "prefill/v1/decode.grpc.pb.h"
#include "proto/status_macros.h"
#include "proto/wire/channel.h"
#include "proto/wire/grpc_status.h"

namespace prefilld::client {
namespace {

using ::prefill::v1::DecodeService;
using ::prefill::v1::GenerateEvent;
using ::prefill::v1::GenerateRequest;

GenerateRequest MakeRequest(const CliOptions& options, const Prompt& prompt) {
  GenerateRequest request;
  request.set_request_id(options.request_id);
  request.mutable_token_ids()->Assign(prompt.token_ids.begin(), prompt.token_ids.end());
  request.set_max_new_tokens(options.max_new_tokens);
  *request.mutable_sampling() = options.sampling;
  *request.mutable_attention() = options.attention;
  request.mutable_stop_token_ids()->Assign(options.stop_token_ids.begin(),
                                           options.stop_token_ids.end());
  request.set_ignore_eos(options.ignore_eos);
  request.set_priority(options.priority);
  request.set_pushed_transfer_id(options.pushed_transfer_id);
  return request;
}

// Takes the events of one call: shows tokens and progress as they come, and keeps what the summary
// needs.
class GenerateView {
 public:
  // `text` turns tokens into text; null: they are shown as ids.
  GenerateView(const CliOptions& options, TextTokens* text)
      : text_(text),
        model_dir_(options.prompt.model_dir),
        show_tokens_(!options.json),
        progress_(!options.quiet) {}

  // Fails if the token of the event cannot be turned into text, or the text of the prompt was not
  // made into tokens of this model.
  absl::Status Take(GenerateEvent& event) {
    switch (event.event_case()) {
      case GenerateEvent::kStarted:
        generated_.request_id = event.started().request_id();
        if (text_ == nullptr) break;
        return CheckServedModel(model_dir_, event.started().vocab_size(),
                                event.started().num_layers());
      case GenerateEvent::kProgress:
        generated_.num_layers = event.progress().progress().num_layers();
        progress_.Update(event.progress().progress(), event.progress().kv_bytes());
        break;
      case GenerateEvent::kToken:
        return TakeToken(*event.mutable_token()->mutable_token());
      case GenerateEvent::kResult:
        generated_.result = std::move(*event.mutable_result());
        has_result_ = true;
        break;
      default:
        break;
    }
    return absl::OkStatus();
  }

  // Must be called when no more events come.
  void End() {
    progress_.Clear();
    if (text_ != nullptr) ShowText(text_->DecodeRest().value_or(""));
    if (show_tokens_ && !generated_.tokens.empty()) std::printf("\n");
    std::fflush(stdout);
  }

  bool has_started() const { return !generated_.request_id.empty(); }
  bool has_result() const { return has_result_; }
  const Generated& generated() const { return generated_; }

 private:
  absl::Status TakeToken(::prefill::v1::SampledToken& token) {
    progress_.Clear();
    if (text_ != nullptr) {
      PREFILLD_ASSIGN_OR_RETURN(const std::string text, text_->Decode(token.token_id()));
      ShowText(text);
    } else if (show_tokens_) {
      std::printf("%s%u", generated_.tokens.empty() ? "" : " ", token.token_id());
      std::fflush(stdout);
    }
    generated_.tokens.push_back(std::move(token));
    return absl::OkStatus();
  }

  void ShowText(const std::string& text) {
    generated_.text += text;
    if (!show_tokens_) return;
    std::fwrite(text.data(), 1, text.size(), stdout);
    std::fflush(stdout);
  }

  TextTokens* const text_;
  const std::string model_dir_;
  const bool show_tokens_;
  ProgressLine progress_;
  Generated generated_;
  bool has_result_ = false;
};

// Makes the call at one worker. UNAVAILABLE without a start: another one may be asked.
absl::Status GenerateAt(const std::string& worker, const CliOptions& options,
                        const GenerateRequest& request, absl::Time deadline,
                        Cancellation& cancellation, GenerateView& view) {
  ChannelOptions channel_options = options.channel;
  channel_options.address = worker;
  PREFILLD_ASSIGN_OR_RETURN(const auto channel, wire::OpenChannel(channel_options));
  grpc::ClientContext context;
  if (deadline != absl::InfiniteFuture()) context.set_deadline(absl::ToChronoTime(deadline));
  for (const auto& [key, value] : options.metadata) context.AddMetadata(key, value);
  CancelHook hook(&cancellation, [&context] { context.TryCancel(); });
  const auto stub = DecodeService::NewStub(channel);
  const auto stream = stub->Generate(&context, request);
  GenerateEvent event;
  absl::Status shown;
  while (shown.ok() && stream->Read(&event)) shown = view.Take(event);
  if (!shown.ok()) {
    context.TryCancel();
    return shown;
  }
  return wire::FromGrpc(stream->Finish());
}

}  // namespace

absl::Status RunGenerate(const CliOptions& options, Cancellation& cancellation) {
  PREFILLD_RETURN_IF_ERROR(CheckMetadata(options.metadata));
  PREFILLD_ASSIGN_OR_RETURN(const Prompt prompt, ReadPrompt(options.prompt));
  const GenerateRequest request = MakeRequest(options, prompt);
  const absl::Time deadline = absl::Now() + options.timeout;
  GenerateView view(options, prompt.text.get());
  absl::Status status;
  for (const std::string& worker : options.workers) {
    status = GenerateAt(worker, options, request, deadline, cancellation, view);
    if (!absl::IsUnavailable(status) || view.has_started()) break;
  }
  view.End();
  PREFILLD_RETURN_IF_ERROR(status);
  if (!view.has_result()) return absl::DataLossError("the stream ended without a result");

  if (options.json) {
    // A model may generate bytes that are not UTF-8.
    std::printf("%s\n", ToJson(view.generated())
                            .dump(2, ' ', false, nlohmann::json::error_handler_t::replace)
                            .c_str());
  } else if (!options.quiet) {
    std::fprintf(stderr, "\n%s", Summary(view.generated()).c_str());
  }
  return absl::OkStatus();
}

}  // namespace prefilld::client
