// Reports of what a call did: as text for people, as JSON for programs.
#ifndef PREFILLD_CLIENT_CLI_SUMMARY_H_
#define PREFILLD_CLIENT_CLI_SUMMARY_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "nlohmann/json_fwd.hpp"
#include "prefill/v1/decode.pb.h"
#include "prefill/v1/prefill.pb.h"

namespace prefilld::client {

// The course of a cache's arrival here, in microseconds since the call began.
struct TransferTimes {
  uint64_t first_frame_us = 0;
  uint64_t last_frame_us = 0;
  uint64_t total_us = 0;
  uint32_t layers_computed_at_first_frame = 0;
  uint32_t num_layers = 0;
  double overlap = 0;  // share of the bytes sent before the last layer was done
};

struct Generated {
  std::string request_id;
  std::vector<::prefill::v1::SampledToken> tokens;
  std::string text;         // of a byte-level model
  uint32_t num_layers = 0;  // 0: no progress was reported
  ::prefill::v1::GenerateResult result;
};

std::string Summary(const Generated& generated);
std::string Summary(const ::prefill::v1::PrefillResult& result, const TransferTimes& times);
std::string Summary(const ::prefill::v1::ServerInfo& info);

nlohmann::json ToJson(const Generated& generated);
nlohmann::json ToJson(const ::prefill::v1::PrefillResult& result, const TransferTimes& times);
nlohmann::json ToJson(const ::prefill::v1::ServerInfo& info);

// Formats one line: the gRPC status by name, its message, and when to come back if the server said
// so.
std::string ErrorText(const absl::Status& status, const std::string& address);

std::string BytesText(uint64_t bytes);            // "1.23 GB"
std::string CountText(uint64_t count);            // "1,234,567"
std::string DurationText(uint64_t microseconds);  // "812 ms", "4.21 s"

}  // namespace prefilld::client

#endif  // PREFILLD_CLIENT_CLI_SUMMARY_H_
