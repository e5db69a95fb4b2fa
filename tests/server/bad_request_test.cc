// Tests requests that are refused before anything is queued, each with field, value and limit.
#include <cmath>
#include <functional>
#include <limits>

#include <gmock/gmock.h>

#include "tests/server/server_fixture.h"

namespace prefilld::server {
namespace {

using ::testing::HasSubstr;

struct BadRequest {
  const char* name;
  std::function<void(v1::PrefillRequest&)> spoil;
  grpc::StatusCode code;
  std::vector<const char*> message;  // parts that it has
};

void PrintTo(const BadRequest& bad, std::ostream* out) { *out << bad.name; }

class BadRequestTest : public ServerFixture, public ::testing::WithParamInterface<BadRequest> {
 protected:
  BadRequestTest() {
    engine_options_.max_tokens = 1000;
    options_.max_lanes = 4;
    options_.allowed_policies = {model::AttentionPolicy::kDense, model::AttentionPolicy::kAuto};
    options_.deliver_to_allow = {"worker-*.pods:7000", "10.2.*.*:7000"};
  }
};

TEST_P(BadRequestTest, IsRefusedWithFieldValueAndLimit) {
  StartServer();
  v1::PrefillRequest request = PromptOf(10, "bad");
  GetParam().spoil(request);
  const StreamContents contents = Prefill(request);
  EXPECT_EQ(contents.status.error_code(), GetParam().code) << contents.status.error_message();
  for (const char* part : GetParam().message) {
    EXPECT_THAT(contents.status.error_message(), HasSubstr(part));
  }
  EXPECT_TRUE(contents.events.empty());
  EXPECT_EQ(engine_->started(), 0);
  EXPECT_EQ(Metric("prefilld_requests_total{outcome=\"invalid\"}"), 1);

  // The next request is served.
  EXPECT_TRUE(Prefill(PromptOf(10)).status.ok());
}

constexpr auto kInvalid = grpc::StatusCode::INVALID_ARGUMENT;
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
using Request = v1::PrefillRequest;

INSTANTIATE_TEST_SUITE_P(
    Rows, BadRequestTest,
    ::testing::Values(
        BadRequest{"EmptyPrompt", [](Request& r) { r.clear_token_ids(); }, kInvalid,
                   {"token_ids", "empty", "1"}},
        BadRequest{"PromptTooLong", [](Request& r) { r = PromptOf(1001); }, kInvalid,
                   {"token_ids", "1001", "1000"}},
        BadRequest{"PromptFarTooLong", [](Request& r) { r = PromptOf(200'000); }, kInvalid,
                   {"token_ids", "200000", "1000"}},
        BadRequest{"TokenOutsideVocabulary", [](Request& r) { r.set_token_ids(7, 256); }, kInvalid,
                   {"token_ids[7]", "256", "vocab_size 256"}},
        BadRequest{"GreatestToken", [](Request& r) { r.set_token_ids(0, 0xffffffff); }, kInvalid,
                   {"token_ids[0]", "4294967295"}},
        BadRequest{"IdTooLong", [](Request& r) { r.set_request_id(std::string(129, 'x')); },
                   kInvalid, {"request_id", "129", "128"}},
        BadRequest{"IdNotPrintable", [](Request& r) { r.set_request_id("a\nb"); }, kInvalid,
                   {"request_id", "printable"}},
        BadRequest{"OtherModel", [](Request& r) { r.set_model_fingerprint("feed"); },
                   grpc::StatusCode::FAILED_PRECONDITION,
                   {"model_fingerprint", "feed", "0123456789abcdef"}},
        BadRequest{"PriorityTooHigh", [](Request& r) { r.set_priority(8); }, kInvalid,
                   {"priority 8", "from -7 to 7"}},
        BadRequest{"PriorityTooLow", [](Request& r) { r.set_priority(-8); }, kInvalid,
                   {"priority -8", "from -7 to 7"}},
        BadRequest{"BlockTokens", [](Request& r) { r.mutable_layout()->set_block_tokens(17); },
                   kInvalid, {"layout.block_tokens", "17", "128"}},
        BadRequest{"Order",
                   [](Request& r) { r.mutable_layout()->set_order(static_cast<v1::KvOrder>(9)); },
                   kInvalid, {"layout.order", "9", "NHD", "HN2D"}},
        BadRequest{"DType",
                   [](Request& r) { r.mutable_layout()->set_dtype(static_cast<v1::DType>(-1)); },
                   kInvalid, {"layout.dtype", "-1", "BF16", "FP8_E4M3"}},
        BadRequest{"Scales",
                   [](Request& r) {
                     r.mutable_layout()->set_dtype(v1::DTYPE_FP8_E4M3);
                     r.mutable_layout()->set_scales(static_cast<v1::KvScales>(3));
                   },
                   kInvalid, {"layout.scales", "3", "PER_TOKEN", "PER_BLOCK"}},
        BadRequest{"ScalesOfAnotherType",
                   [](Request& r) {
                     r.mutable_layout()->set_dtype(v1::DTYPE_FP16);
                     r.mutable_layout()->set_scales(v1::KV_SCALES_PER_BLOCK);
                   },
                   kInvalid, {"layout.scales", "PER_BLOCK", "DTYPE_FP16", "DTYPE_FP8_E4M3"}},
        BadRequest{"ScalesOfTheServersType",
                   [](Request& r) { r.mutable_layout()->set_scales(v1::KV_SCALES_PER_TOKEN); },
                   kInvalid, {"layout.scales", "PER_TOKEN", "DTYPE_BF16"}},
        BadRequest{"FirstHead", [](Request& r) { r.mutable_layout()->set_first_head(2); }, kInvalid,
                   {"layout.first_head", "2"}},
        BadRequest{"NumHeads", [](Request& r) { r.mutable_layout()->set_num_heads(3); }, kInvalid,
                   {"layout.num_heads", "3", "2"}},
        BadRequest{"HeadRangeOverflows",
                   [](Request& r) {
                     r.mutable_layout()->set_first_head(1);
                     r.mutable_layout()->set_num_heads(0xffffffff);
                   },
                   kInvalid, {"layout.num_heads", "4294967295", "2"}},
        BadRequest{"FirstBlock", [](Request& r) { r.mutable_layout()->set_first_block(2); },
                   kInvalid, {"layout.first_block", "2", "1"}},
        BadRequest{"Temperature", [](Request& r) { r.mutable_sampling()->set_temperature(-1); },
                   kInvalid, {"temperature", "-1"}},
        BadRequest{"TemperatureNan", [](Request& r) { r.mutable_sampling()->set_temperature(kNan); },
                   kInvalid, {"temperature", "nan"}},
        BadRequest{"TopP", [](Request& r) { r.mutable_sampling()->set_top_p(1.5f); }, kInvalid,
                   {"top_p", "1.5"}},
        BadRequest{"TopLogprobs", [](Request& r) { r.mutable_sampling()->set_top_logprobs(21); },
                   kInvalid, {"top_logprobs", "21", "20"}},
        BadRequest{"UnknownPolicy",
                   [](Request& r) {
                     r.mutable_attention()->set_policy(static_cast<v1::AttentionPolicy>(77));
                   },
                   kInvalid, {"attention.policy", "77"}},
        BadRequest{"PolicyNotAllowed",
                   [](Request& r) {
                     r.mutable_attention()->set_policy(v1::ATTENTION_POLICY_SHARE);
                   },
                   kInvalid, {"attention.policy", "share", "dense", "auto"}},
        BadRequest{"Gamma", [](Request& r) { r.mutable_attention()->set_gamma(0); }, kInvalid,
                   {"gamma", "0"}},
        BadRequest{"GammaNan", [](Request& r) { r.mutable_attention()->set_gamma(kNan); }, kInvalid,
                   {"gamma", "nan"}},
        BadRequest{"Tau", [](Request& r) { r.mutable_attention()->set_tau(1.5f); }, kInvalid,
                   {"tau", "1.5"}},
        BadRequest{"Delta", [](Request& r) { r.mutable_attention()->set_delta(-0.5f); }, kInvalid,
                   {"delta", "-0.5"}},
        BadRequest{"Coverage", [](Request& r) { r.mutable_attention()->set_coverage(2); }, kInvalid,
                   {"coverage", "2"}},
        BadRequest{"Density", [](Request& r) { r.mutable_attention()->set_density(0); }, kInvalid,
                   {"density", "0", "1"}},
        BadRequest{"RecallAuditRows",
                   [](Request& r) { r.mutable_attention()->set_recall_audit_rows(9); }, kInvalid,
                   {"attention.recall_audit_rows", "9", "8"}},
        BadRequest{"TooManyLanes", [](Request& r) { r.set_num_lanes(5); }, kInvalid,
                   {"num_lanes", "5", "4"}},
        BadRequest{"TooManyReceivers", [](Request& r) { r.set_num_receivers(17); }, kInvalid,
                   {"num_receivers", "17", "16"}},
        BadRequest{"ReceiverKeyWithoutReceivers",
                   [](Request& r) { r.set_receiver_key(std::string(32, 'k')); }, kInvalid,
                   {"receiver_key", "num_receivers 0", "2"}},
        BadRequest{"ReceiverKeyThatCanBeGuessed",
                   [](Request& r) {
                     r.set_num_receivers(2);
                     r.set_receiver_key(std::string(31, 'k'));
                   },
                   kInvalid, {"receiver_key", "31", "32"}},
        BadRequest{"ReceiverKeyTooLong",
                   [](Request& r) {
                     r.set_num_receivers(2);
                     r.set_receiver_key(std::string(129, 'k'));
                   },
                   kInvalid, {"receiver_key", "129", "128"}},
        BadRequest{"PushAddress",
                   [](Request& r) { r.mutable_deliver_to()->set_address("unix:etc/passwd"); },
                   kInvalid, {"deliver_to.address", "unix:etc/passwd", "host:port"}},
        BadRequest{"PushToASocket",
                   [](Request& r) { r.mutable_deliver_to()->set_address("unix:/etc/passwd"); },
                   grpc::StatusCode::PERMISSION_DENIED, {"unix:/etc/passwd", "allow-list"}},
        BadRequest{"PushToANameThatLooksLikeAnAllowedAddress",
                   [](Request& r) { r.mutable_deliver_to()->set_address("10.2.evil.example:7000"); },
                   grpc::StatusCode::PERMISSION_DENIED, {"10.2.evil.example:7000", "allow-list"}},
        BadRequest{"PushAddressTooLong",
                   [](Request& r) {
                     r.mutable_deliver_to()->set_address(std::string(20'000, 'a') + ":1");
                   },
                   kInvalid, {"deliver_to.address", "20002", "256"}},
        BadRequest{"PushNotAllowed",
                   [](Request& r) { r.mutable_deliver_to()->set_address("evil.example:7000"); },
                   grpc::StatusCode::PERMISSION_DENIED,
                   {"deliver_to.address", "evil.example:7000", "allow-list"}},
        BadRequest{"PushToANameThatOnlyEndsAsAllowed",
                   [](Request& r) {
                     r.mutable_deliver_to()->set_address("worker-1.evil.example.pods:7000");
                   },
                   grpc::StatusCode::PERMISSION_DENIED, {"worker-1.evil.example.pods:7000"}},
        BadRequest{"PushWithoutTransferId",
                   [](Request& r) { r.mutable_deliver_to()->set_address("worker-1.pods:7000"); },
                   kInvalid, {"deliver_to.transfer_id", "empty"}},
        BadRequest{"PushesAndLanes",
                   [](Request& r) {
                     r.add_pushes();
                     r.set_num_lanes(2);
                   },
                   kInvalid, {"num_lanes", "2", "pushes"}},
        BadRequest{"PushesAndAPush",
                   [](Request& r) {
                     r.mutable_deliver_to()->set_address("worker-1.pods:7000");
                     r.add_pushes();
                   },
                   kInvalid, {"deliver_to and pushes"}},
        BadRequest{"TooManyPushes",
                   [](Request& r) {
                     for (int i = 0; i < 17; ++i) r.add_pushes();
                   },
                   kInvalid, {"pushes has 17", "16"}},
        BadRequest{"PushesOverLanes",
                   [](Request& r) {
                     r.add_pushes();
                     r.set_num_lanes(2);
                   },
                   kInvalid, {"num_lanes 2", "pushes"}},
        BadRequest{"OneOfThePushesIsNotAllowed",
                   [](Request& r) {
                     for (const char* address : {"worker-1.pods:7000", "evil.example:7000"}) {
                       r.add_pushes()->mutable_deliver_to()->set_address(address);
                       r.mutable_pushes()->rbegin()->mutable_deliver_to()->set_transfer_id("t");
                     }
                   },
                   grpc::StatusCode::PERMISSION_DENIED,
                   {"pushes[1].deliver_to.address", "evil.example:7000", "allow-list"}},
        BadRequest{"LayoutOfAPush",
                   [](Request& r) {
                     v1::Push& push = *r.add_pushes();
                     push.mutable_deliver_to()->set_address("worker-1.pods:7000");
                     push.mutable_deliver_to()->set_transfer_id("t");
                     push.mutable_layout()->set_first_head(2);
                   },
                   kInvalid, {"pushes[0]", "layout.first_head 2"}},
        BadRequest{"PushToReceivers",
                   [](Request& r) {
                     r.mutable_deliver_to()->set_address("worker-1.pods:7000");
                     r.set_num_receivers(2);
                   },
                   kInvalid, {"num_receivers", "2", "deliver_to"}}),
    [](const auto& info) { return std::string(info.param.name); });

class DefaultPolicies : public ServerFixture {};

TEST_F(DefaultPolicies, LeaveOutTheBaselines) {
  StartServer();
  for (const auto policy :
       {v1::ATTENTION_POLICY_BASELINE_QUERY_AWARE, v1::ATTENTION_POLICY_BASELINE_RANDOM}) {
    v1::PrefillRequest request = PromptOf(10);
    request.mutable_attention()->set_policy(policy);
    const StreamContents contents = Prefill(request);
    EXPECT_EQ(contents.status.error_code(), kInvalid);
    EXPECT_THAT(contents.status.error_message(),
                HasSubstr("is not allowed here; allowed: dense vertical_slash share auto"));
  }
}

class PushSwitchedOff : public ServerFixture {};

TEST_F(PushSwitchedOff, IsUnimplemented) {
  StartServer();
  v1::PrefillRequest request = PromptOf(10);
  request.mutable_deliver_to()->set_address("worker-1.pods:7000");
  request.mutable_deliver_to()->set_transfer_id("t");
  EXPECT_EQ(Prefill(request).status.error_code(), grpc::StatusCode::UNIMPLEMENTED);
}

}  // namespace
}  // namespace prefilld::server
