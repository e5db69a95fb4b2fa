#include "server/frame_codec.h"

#include <utility>

#include <google/protobuf/io/coded_stream.h>
#include <google/protobuf/message_lite.h>
#include <google/protobuf/wire_format_lite.h>
#include <grpcpp/support/slice.h>
#include <xxhash.h>

#include "prefill/v1/prefill.pb.h"
#include "prefill/v1/receiver.pb.h"

namespace prefilld::server {
namespace {

namespace v1 = ::prefill::v1;
using google::protobuf::internal::WireFormatLite;
using google::protobuf::io::CodedOutputStream;

constexpr int kKvFrameField = v1::PrefillEvent::kKvFrameFieldNumber;
static_assert(kKvFrameField == int{v1::ReceiveRequest::kKvFrameFieldNumber},
              "one encoding serves the response stream and the push stream");

// Seven varint fields and a fixed64, each with a tag of one byte, then payload's tag and length.
constexpr size_t kMaxFrameFields = 7 * (1 + 10) + (1 + 8) + (1 + 10);
// The enclosing event's tag and length.
constexpr size_t kMaxEventPrefix = 1 + 10;

uint8_t* WriteFrameFields(const FrameHeader& h, size_t payload_bytes, uint8_t* out) {
  out = WireFormatLite::WriteUInt32ToArray(v1::KvFrame::kLaneFieldNumber, h.lane, out);
  out = WireFormatLite::WriteUInt64ToArray(v1::KvFrame::kSequenceFieldNumber, h.sequence, out);
  out = WireFormatLite::WriteUInt32ToArray(v1::KvFrame::kLayerFieldNumber, h.layer, out);
  out = WireFormatLite::WriteUInt32ToArray(v1::KvFrame::kFirstBlockFieldNumber, h.first_block, out);
  out = WireFormatLite::WriteUInt32ToArray(v1::KvFrame::kNumBlocksFieldNumber, h.num_blocks, out);
  out = WireFormatLite::WriteFixed64ToArray(v1::KvFrame::kChecksumFieldNumber, h.checksum, out);
  out = WireFormatLite::WriteUInt64ToArray(v1::KvFrame::kSentAtUsFieldNumber, h.sent_at_us, out);
  out = WireFormatLite::WriteUInt32ToArray(v1::KvFrame::kLayersComputedFieldNumber,
                                           h.layers_computed, out);
  out = WireFormatLite::WriteTagToArray(v1::KvFrame::kPayloadFieldNumber,
                                        WireFormatLite::WIRETYPE_LENGTH_DELIMITED, out);
  return CodedOutputStream::WriteVarint64ToArray(payload_bytes, out);
}

void DestroyLease(void* lease) { delete static_cast<StagingRing::Lease*>(lease); }

}  // namespace

uint64_t Checksum(const void* data, size_t bytes) { return XXH3_64bits(data, bytes); }

grpc::ByteBuffer EncodeFrame(const FrameHeader& header, StagingRing::Lease payload,
                             size_t payload_bytes) {
  uint8_t fields[kMaxFrameFields];
  const size_t fields_bytes = WriteFrameFields(header, payload_bytes, fields) - fields;

  uint8_t prefix[kMaxEventPrefix];
  uint8_t* end = WireFormatLite::WriteTagToArray(kKvFrameField,
                                                 WireFormatLite::WIRETYPE_LENGTH_DELIMITED, prefix);
  end = CodedOutputStream::WriteVarint64ToArray(fields_bytes + payload_bytes, end);

  auto* lease = new StagingRing::Lease(std::move(payload));
  const grpc::Slice slices[] = {grpc::Slice(prefix, end - prefix),
                                grpc::Slice(fields, fields_bytes),
                                grpc::Slice(lease->data(), payload_bytes, &DestroyLease, lease)};
  return grpc::ByteBuffer(slices, 3);
}

grpc::ByteBuffer EncodeMessage(const google::protobuf::MessageLite& message) {
  const grpc::Slice slice(message.SerializeAsString());
  return grpc::ByteBuffer(&slice, 1);
}

}  // namespace prefilld::server
