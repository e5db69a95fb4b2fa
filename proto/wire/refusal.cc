#include "proto/wire/refusal.h"

#include <algorithm>
#include <cstdint>

#include "absl/strings/str_cat.h"

namespace prefilld::wire {
namespace {

constexpr absl::string_view kPreface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
constexpr size_t kFrameHeaderBytes = 9;
enum FrameType : uint8_t { kHeaders = 1, kSettings = 4, kGoaway = 7 };
constexpr uint8_t kEndOfStreamAndHeaders = 0x5;
constexpr char kEnhanceYourCalm = 11;
constexpr char kResourceExhausted[] = "8";  // of gRPC

// Makes a frame with a payload of fewer than 256 bytes on one of the first 256 streams.
std::string Frame(FrameType type, uint8_t flags, uint8_t stream, absl::string_view payload) {
  std::string frame(kFrameHeaderBytes, '\0');
  frame[2] = static_cast<char>(payload.size());
  frame[3] = static_cast<char>(type);
  frame[4] = static_cast<char>(flags);
  frame[8] = static_cast<char>(stream);
  return absl::StrCat(frame, payload);
}

// A header field as HPACK's literal without indexing, for texts of fewer than 127 bytes.
std::string HeaderField(absl::string_view name, absl::string_view value) {
  std::string field(1, '\0');
  field += static_cast<char>(name.size());
  absl::StrAppend(&field, name);
  field += static_cast<char>(value.size());
  return absl::StrCat(field, value);
}

size_t PayloadBytes(absl::string_view frame) {
  const auto byte = [frame](int i) { return static_cast<size_t>(static_cast<uint8_t>(frame[i])); };
  return byte(0) << 16 | byte(1) << 8 | byte(2);
}

}  // namespace

std::string Refusal::Greeting() { return Frame(kSettings, 0, 0, ""); }

std::string Refusal::Take(absl::string_view bytes) {
  absl::StrAppend(&received_, bytes.substr(0, kMaxBytes - std::min(kMaxBytes, received_.size())));
  if (!preface_passed_) {
    if (received_.size() < kPreface.size()) return "";
    received_.erase(0, kPreface.size());
    preface_passed_ = true;
  }
  while (received_.size() >= kFrameHeaderBytes) {
    if (received_[3] == kHeaders) {
      constexpr char kStatus200 = '\x88';  // an entry of HPACK's static table
      const std::string fields = absl::StrCat(
          absl::string_view(&kStatus200, 1), HeaderField("content-type", "application/grpc"),
          HeaderField("grpc-status", kResourceExhausted), HeaderField("grpc-message", reason_));
      // A client's first stream is number 1.
      return absl::StrCat(Frame(kHeaders, kEndOfStreamAndHeaders, 1, fields), Goaway());
    }
    const size_t size = kFrameHeaderBytes + PayloadBytes(received_);
    if (received_.size() < size) break;
    received_.erase(0, size);
  }
  return "";
}

std::string Refusal::Goaway() const {
  std::string payload(8, '\0');
  payload[3] = 1;  // the last stream that was looked at
  payload[7] = kEnhanceYourCalm;
  return Frame(kGoaway, 0, 0, absl::StrCat(payload, reason_));
}

}  // namespace prefilld::wire
