#include "server/grpc_encoding.h"

#include <memory>
#include <optional>
#include <utility>

#include <grpcpp/support/slice.h>

#include "proto/wire/frame_codec.h"
#include "server/shared_region.h"

namespace prefilld::server {
namespace {

namespace v1 = ::prefill::v1;

using SharedLease = std::shared_ptr<const StagingRing::Lease>;

void ReturnLease(void* lease) { delete static_cast<SharedLease*>(lease); }

// Says where a frame lies in the memory that its consumer reads. The lane keeps the frame until it
// is acknowledged.
std::optional<grpc::ByteBuffer> EncodeReference(const KvFrame& frame) {
  const SharedRegion* const region = frame.payload->region();
  if (region == nullptr || !frame.payload->credit()->is_read_in_place()) return std::nullopt;
  wire::FrameHeader header = frame.header;
  header.shared_offset = region->OffsetOf(frame.payload->data());
  header.shared_bytes = static_cast<uint32_t>(frame.payload_bytes);
  return wire::EncodeFrame(header, grpc::Slice());
}

}  // namespace

grpc::ByteBuffer EncodeFrame(KvFrame frame) {
  auto* lease = new SharedLease(std::move(frame.payload));
  return wire::EncodeFrame(frame.header,
                           grpc::Slice((*lease)->data(), frame.payload_bytes, &ReturnLease, lease));
}

grpc::ByteBuffer EncodeEvent(Message message) {
  if (auto* frame = std::get_if<KvFrame>(&message)) {
    if (auto reference = EncodeReference(*frame)) return *std::move(reference);
    return EncodeFrame(std::move(*frame));
  }
  return wire::EncodeMessage(std::get<v1::PrefillEvent>(message));
}

grpc::ByteBuffer EncodeReceiveRequest(Message message, const v1::ReceiveOpen& open) {
  if (auto* frame = std::get_if<KvFrame>(&message)) return EncodeFrame(std::move(*frame));
  auto& event = std::get<v1::PrefillEvent>(message);
  v1::ReceiveRequest request;
  if (event.has_accepted()) {
    *request.mutable_open() = open;
  } else {
    *request.mutable_result() = std::move(*event.mutable_result());
  }
  return wire::EncodeMessage(request);
}

}  // namespace prefilld::server
