// Messages as the gRPC transports send them.
#ifndef PREFILLD_SERVER_GRPC_ENCODING_H_
#define PREFILLD_SERVER_GRPC_ENCODING_H_

#include <string>

#include <grpcpp/support/byte_buffer.h>

#include "server/transport.h"

namespace prefilld::server {

// A PrefillEvent, and byte for byte the same a ReceiveRequest, that holds the frame. Its payload is
// not copied: the staging buffer goes back to its ring when gRPC lets go of the message.
grpc::ByteBuffer EncodeFrame(KvFrame frame);

// As a PrefillEvent.
grpc::ByteBuffer EncodeEvent(Message message);
// As a ReceiveRequest: Accepted opens the transfer `transfer_id`, the result ends it, and there are
// frames between. Other events have no place there.
grpc::ByteBuffer EncodeReceiveRequest(Message message, const std::string& transfer_id);

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_GRPC_ENCODING_H_
