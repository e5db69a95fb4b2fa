#ifndef PREFILLD_CLIENT_RAW_STREAM_H_
#define PREFILLD_CLIENT_RAW_STREAM_H_

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "google/protobuf/message_lite.h"
#include "grpcpp/client_context.h"
#include "grpcpp/completion_queue.h"
#include "grpcpp/generic/generic_stub.h"
#include "grpcpp/support/byte_buffer.h"

namespace prefilld::client {

// A server-streaming call whose messages arrive undecoded, as the slices that gRPC read from the
// socket. One thread uses it, which also drives the connection while it waits; any thread may call
// Cancel at any time.
class RawStream {
 public:
  explicit RawStream(std::shared_ptr<grpc::Channel> channel);
  ~RawStream();
  RawStream(const RawStream&) = delete;
  RawStream& operator=(const RawStream&) = delete;

  // Starts the call; may be called once. Blocks while the channel connects. `method` is
  // "/package.Service/Method". `metadata` goes with it, as keys and values that gRPC carries.
  // Errors show at the end of the stream.
  void Start(const std::string& method, const google::protobuf::MessageLite& request,
             absl::Time deadline,
             const std::vector<std::pair<std::string, std::string>>& metadata = {});
  // Reads a message. Returns false at the end of the stream; Finish tells why it ended.
  bool Read(grpc::ByteBuffer& message);
  // Returns the call's status. May be called once, after Read returned false.
  absl::Status Finish();
  void Cancel() { context_.TryCancel(); }

 private:
  bool WaitForOperation();

  grpc::ClientContext context_;
  grpc::CompletionQueue queue_;
  grpc::GenericStub stub_;
  std::unique_ptr<grpc::GenericClientAsyncReaderWriter> call_;
  bool open_ = false;
  bool finished_ = false;
};

}  // namespace prefilld::client

#endif  // PREFILLD_CLIENT_RAW_STREAM_H_
