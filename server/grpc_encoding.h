// Encodes messages as the gRPC transports send them.
#ifndef PREFILLD_SERVER_GRPC_ENCODING_H_
#define PREFILLD_SERVER_GRPC_ENCODING_H_

#include <string>

#include <grpcpp/support/byte_buffer.h>

#include "server/transport.h"

namespace prefilld::server {

// Encodes a frame as a PrefillEvent, whose bytes are those of the ReceiveRequest with the same
// frame. The payload is not copied: its staging buffer goes back to the ring when gRPC lets go of
// the message.
grpc::ByteBuffer EncodeFrame(KvFrame frame);

// Encodes a message as a PrefillEvent. Where a frame's payload lies in memory that the consumer
// reads, its place there is encoded.
grpc::ByteBuffer EncodeEvent(Message message);
// Encodes a message as a ReceiveRequest. Accepted opens the transfer `transfer_id`, frames follow,
// and the result ends it. No other event may be passed.
grpc::ByteBuffer EncodeReceiveRequest(Message message, const std::string& transfer_id);

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_GRPC_ENCODING_H_
