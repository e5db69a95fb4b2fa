#include "proto/wire/grpc_status.h"

#include <gtest/gtest.h>

#include "google/rpc/retry_info.pb.h"
#include "google/rpc/status.pb.h"

namespace prefilld::wire {
namespace {

absl::Status Full() { return absl::ResourceExhaustedError("the queue is full"); }

google::rpc::Status Details(const grpc::Status& status) {
  google::rpc::Status details;
  EXPECT_TRUE(details.ParseFromString(status.error_details()));
  return details;
}

TEST(GrpcStatus, CodeAndMessageSurviveBothDirections) {
  const absl::Status status = absl::NotFoundError("no such request");
  EXPECT_EQ(FromGrpc(ToGrpc(status)), status);
  EXPECT_TRUE(ToGrpc(absl::OkStatus()).ok());
  EXPECT_TRUE(FromGrpc(grpc::Status::OK).ok());
  EXPECT_TRUE(ToGrpc(status).error_details().empty());
}

TEST(GrpcStatus, APayloadBecomesADetailOfTheSameStatus) {
  const grpc::Status status = ToGrpc(WithRetryDelay(Full(), absl::Milliseconds(2500)));
  const google::rpc::Status details = Details(status);
  EXPECT_EQ(details.code(), static_cast<int>(grpc::StatusCode::RESOURCE_EXHAUSTED));
  EXPECT_EQ(details.message(), "the queue is full");
  ASSERT_EQ(details.details_size(), 1);
  google::rpc::RetryInfo retry;
  ASSERT_TRUE(details.details(0).UnpackTo(&retry));
  EXPECT_EQ(retry.retry_delay().seconds(), 2);
  EXPECT_EQ(retry.retry_delay().nanos(), 500'000'000);
}

TEST(GrpcStatus, DetailsSurviveAProcessThatPassesTheStatusOn) {
  google::rpc::Status details;
  details.add_details()->set_type_url("type.googleapis.com/of.another.Program");
  details.add_details()->set_type_url("type.googleapis.com/of.another.Program");
  const grpc::Status received(grpc::StatusCode::ABORTED, "gone", details.SerializeAsString());
  EXPECT_EQ(ToGrpc(FromGrpc(received)).error_details(), received.error_details());
  EXPECT_EQ(Details(ToGrpc(WithPrefix("worker: ", FromGrpc(received)))).details_size(), 2);

  const grpc::Status bytes_of_no_status(grpc::StatusCode::ABORTED, "gone", "\xff\xff");
  EXPECT_EQ(ToGrpc(FromGrpc(bytes_of_no_status)).error_details(), "\xff\xff");
}

TEST(GrpcStatus, WhatIsAddedOnTheWayJoinsWhatWasReceived) {
  google::rpc::Status details;
  details.add_details()->set_type_url("type.googleapis.com/of.another.Program");
  const grpc::Status received(grpc::StatusCode::UNAVAILABLE, "gone", details.SerializeAsString());
  const google::rpc::Status both =
      Details(ToGrpc(WithRetryDelay(FromGrpc(received), absl::Seconds(1))));
  ASSERT_EQ(both.details_size(), 2);
  EXPECT_EQ(both.details(0).type_url(), "type.googleapis.com/of.another.Program");
  EXPECT_TRUE(both.details(1).Is<google::rpc::RetryInfo>());
}

TEST(RetryDelay, IsReadFromAStatusOfThisProcessAndFromAReceivedOne) {
  const absl::Duration delay = absl::Seconds(3) + absl::Nanoseconds(7);
  const absl::Status status = WithRetryDelay(Full(), delay);
  EXPECT_EQ(RetryDelay(status), delay);
  EXPECT_EQ(RetryDelay(FromGrpc(ToGrpc(status))), delay);
  EXPECT_EQ(RetryDelay(Full()), std::nullopt);
  EXPECT_EQ(RetryDelay(absl::OkStatus()), std::nullopt);
}

TEST(WithPrefix, KeepsCodeAndDetails) {
  const absl::Status status =
      WithPrefix("deliver_to w:1: ", WithRetryDelay(Full(), absl::Seconds(1)));
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(status.message(), "deliver_to w:1: the queue is full");
  EXPECT_EQ(RetryDelay(status), absl::Seconds(1));
}

}  // namespace
}  // namespace prefilld::wire
