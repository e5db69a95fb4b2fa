#include "proto/wire/grpc_status.h"

#include <string>

#include "absl/strings/cord.h"
#include "absl/strings/str_cat.h"
#include "google/rpc/retry_info.pb.h"
#include "google/rpc/status.pb.h"

namespace prefilld::wire {
namespace {

// The payload under this URL holds a received google.rpc.Status unchanged.
constexpr absl::string_view kReceivedUrl = "type.googleapis.com/google.rpc.Status";
constexpr absl::string_view kRetryInfoUrl = "type.googleapis.com/google.rpc.RetryInfo";

}  // namespace

grpc::Status ToGrpc(const absl::Status& status) {
  if (status.ok()) return grpc::Status::OK;
  // The two enums have the same values by design.
  const auto code = static_cast<grpc::StatusCode>(status.code());
  const std::string message(status.message());
  std::string received;
  google::rpc::Status added;
  status.ForEachPayload([&](absl::string_view url, const absl::Cord& payload) {
    if (url == kLocalPayload) return;
    if (url == kReceivedUrl) {
      received = std::string(payload);
      return;
    }
    google::protobuf::Any& any = *added.add_details();
    any.set_type_url(std::string(url));
    any.set_value(std::string(payload));
  });
  if (added.details().empty()) return grpc::Status(code, message, received);
  added.set_code(static_cast<int32_t>(code));
  added.set_message(message);
  // Protobuf merges messages that are concatenated, so the details of both are kept.
  return grpc::Status(code, message, received + added.SerializeAsString());
}

absl::Status FromGrpc(const grpc::Status& status) {
  absl::Status result(static_cast<absl::StatusCode>(status.error_code()), status.error_message());
  if (!result.ok() && !status.error_details().empty()) {
    result.SetPayload(kReceivedUrl, absl::Cord(status.error_details()));
  }
  return result;
}

absl::Status WithRetryDelay(absl::Status status, absl::Duration delay) {
  google::rpc::RetryInfo info;
  const int64_t seconds = absl::IDivDuration(delay, absl::Seconds(1), &delay);
  info.mutable_retry_delay()->set_seconds(seconds);
  info.mutable_retry_delay()->set_nanos(static_cast<int32_t>(absl::ToInt64Nanoseconds(delay)));
  status.SetPayload(kRetryInfoUrl, absl::Cord(info.SerializeAsString()));
  return status;
}

std::optional<absl::Duration> RetryDelay(const absl::Status& status) {
  google::rpc::Status details;
  if (!details.ParseFromString(ToGrpc(status).error_details())) return std::nullopt;
  for (const google::protobuf::Any& detail : details.details()) {
    google::rpc::RetryInfo retry;
    if (!detail.UnpackTo(&retry)) continue;
    return absl::Seconds(retry.retry_delay().seconds()) +
           absl::Nanoseconds(retry.retry_delay().nanos());
  }
  return std::nullopt;
}

absl::Status WithPrefix(absl::string_view prefix, const absl::Status& status) {
  absl::Status result(status.code(), absl::StrCat(prefix, status.message()));
  status.ForEachPayload([&result](absl::string_view url, const absl::Cord& payload) {
    result.SetPayload(url, payload);
  });
  return result;
}

}  // namespace prefilld::wire
