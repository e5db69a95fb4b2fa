// Encodes messages as the gRPC transports send them.
#ifndef PREFILLD_SERVER_GRPC_ENCODING_H_
#define PREFILLD_SERVER_GRPC_ENCODING_H_

#include <grpcpp/support/byte_buffer.h>

#include "prefill/v1/receiver.pb.h"
#include "server/transport.h"

namespace prefilld::server {

// Encodes a frame as a PrefillEvent, whose bytes are those of the ReceiveRequest with the same
// frame. The payload is not copied: its staging buffer goes back to the ring when gRPC lets go of
// the message.
grpc::ByteBuffer EncodeFrame(KvFrame frame);

// Encodes a message as a PrefillEvent. Where a frame's payload lies in memory that the consumer
// reads, its place there is encoded.
grpc::ByteBuffer EncodeEvent(Message message);
// Encodes a message as a ReceiveRequest. In place of Accepted goes `open`, frames follow, and the
// result ends it. No other event may be passed.
grpc::ByteBuffer EncodeReceiveRequest(Message message, const ::prefill::v1::ReceiveOpen& open);

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_GRPC_ENCODING_H_
