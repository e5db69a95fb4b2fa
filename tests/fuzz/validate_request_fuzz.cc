// Fuzzes requests as any client might send them. A request that passes validation is safe to
// compute.
//
// Input: one byte that chooses what the operator allows, then a serialized PrefillRequest.
#include <cstddef>
#include <cstdint>

#include <google/protobuf/stubs/logging.h>

#include "model/sparse/attention_options.h"
#include "model/sparse/attention_policy.h"
#include "prefill/v1/prefill.pb.h"
#include "proto/wire/kv_layout.h"
#include "server/prefill_work.h"
#include "tests/fuzz/require.h"

namespace prefilld::server {
namespace {

using fuzz::Require;

model::EngineInfo Engine() {
  model::EngineInfo engine;
  engine.config.vocab_size = 256;
  engine.config.num_layers = 8;
  engine.config.num_heads = 8;
  engine.config.num_kv_heads = 4;
  engine.config.head_dim = 64;
  engine.fingerprint = "0123456789abcdef0123456789abcdef";
  engine.max_tokens = 1000;
  return engine;
}

RequestLimits Limits(const model::EngineInfo& engine, uint8_t choice) {
  RequestLimits limits;
  limits.engine = &engine;
  auto& allowed = limits.attention.allowed_policies;
  allowed = model::PoliciesForServing();
  if ((choice & 1) != 0) {
    allowed.push_back(model::AttentionPolicy::kBaselineQueryAware);
    allowed.push_back(model::AttentionPolicy::kBaselineRandom);
  }
  if ((choice & 2) != 0) limits.deliver_to_allow = {"worker-*.pods:7000", "*.*.*.*:7001"};
  limits.max_lanes = (choice & 4) != 0 ? 16 : 1;
  return limits;
}

void CheckWork(const PrefillWork& work, const RequestLimits& limits) {
  const model::EngineInfo& engine = *limits.engine;
  Require(!work.id.empty() && work.id.size() <= 128, "a request has an id of bounded length");
  Require(!work.tokens.empty() && static_cast<int64_t>(work.tokens.size()) <= engine.max_tokens,
          "the prompt fits");
  for (const uint32_t token : work.tokens) Require(token < 256, "tokens are of the vocabulary");
  const auto& layout = work.layout;
  Require(layout.num_heads() > 0 && layout.first_head() < 4 &&
              layout.first_head() + layout.num_heads() <= 4,
          "the heads are the model's");
  Require(work.num_sent_blocks() >= 0 && work.num_sent_blocks() <= layout.num_blocks(),
          "the blocks are the prompt's");
  Require(wire::KvPairBytes(layout) > 0 &&
              wire::KvPairBytes(layout) <=
                  wire::MaxKvPairBytes(engine.config.num_kv_heads, engine.config.head_dim),
          "a block has the room that was set aside for the largest");
  Require(wire::HasScales(layout.dtype()) == wire::IsKvScales(layout.scales()),
          "fp8 has scales, and no other type has");
  Require(model::PackedBytes(SelectBlocks(layout, 0, 1), engine.config.head_dim) ==
              wire::KvPairBytes(layout),
          "what packs a frame and what describes it agree on its size");
  Require(work.num_lanes >= 1 && work.num_lanes <= limits.max_lanes, "the lanes are allowed");
  Require(model::Validate(work.attention).ok(), "the thresholds are in range");
  Require(model::Validate(work.sampling).ok(), "the sampling options are in range");
  Require(!work.pushes() || !limits.deliver_to_allow.empty(), "a push is allowed");
}

}  // namespace
}  // namespace prefilld::server

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace prefilld::server;
  static const google::protobuf::LogSilencer silencer;  // of strings that are not UTF-8
  static const prefilld::model::EngineInfo engine = Engine();
  if (size < 1) return 0;
  ::prefill::v1::PrefillRequest request;
  if (!request.ParseFromArray(data + 1, static_cast<int>(size - 1))) return 0;
  const RequestLimits limits = Limits(engine, data[0]);
  const auto work = ValidateRequest(request, limits);
  if (work.ok()) CheckWork(*work, limits);
  return 0;
}
