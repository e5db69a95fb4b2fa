// A prefill server that follows a script. It runs in this process, on a real socket.
#ifndef PREFILLD_TESTS_CLIENT_SCRIPTED_SERVER_H_
#define PREFILLD_TESTS_CLIENT_SCRIPTED_SERVER_H_

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "grpcpp/server.h"
#include "prefill/v1/prefill.grpc.pb.h"

namespace prefilld::client {

using PrefillWriter = grpc::ServerWriter<::prefill::v1::PrefillEvent>;

class ScriptedServer : public ::prefill::v1::PrefillService::Service {
 public:
  using PrefillScript = std::function<grpc::Status(
      grpc::ServerContext&, const ::prefill::v1::PrefillRequest&, PrefillWriter&)>;
  using LaneScript =
      std::function<grpc::Status(const ::prefill::v1::AttachLaneRequest&, PrefillWriter&)>;

  using ReceiverScript =
      std::function<grpc::Status(const ::prefill::v1::AttachReceiverRequest&, PrefillWriter&)>;

  explicit ScriptedServer(PrefillScript prefill, LaneScript lane = nullptr,
                          ReceiverScript receiver = nullptr);
  ~ScriptedServer() override;

  const std::string& address() const { return address_; }
  // Returns the connections that carried a Prefill or AttachLane call.
  std::vector<std::string> peers();

  grpc::Status Prefill(grpc::ServerContext* context, const ::prefill::v1::PrefillRequest* request,
                       PrefillWriter* writer) override;
  grpc::Status AttachLane(grpc::ServerContext* context,
                          const ::prefill::v1::AttachLaneRequest* request,
                          PrefillWriter* writer) override;
  grpc::Status AttachReceiver(grpc::ServerContext* context,
                              const ::prefill::v1::AttachReceiverRequest* request,
                              PrefillWriter* writer) override;
  grpc::Status GetServerInfo(grpc::ServerContext* context,
                             const ::prefill::v1::GetServerInfoRequest* request,
                             ::prefill::v1::ServerInfo* info) override;

 private:
  void NotePeer(const grpc::ServerContext& context);

  const PrefillScript prefill_;
  const LaneScript lane_;
  const ReceiverScript receiver_;
  std::string address_;
  std::mutex mu_;
  std::vector<std::string> peers_;
  std::unique_ptr<grpc::Server> server_;
};

// A small correct transfer: 3 layers, 2 heads of 8, fp32, 40 tokens in blocks of 16.
::prefill::v1::PrefillRequest SmallRequest();
::prefill::v1::KvLayout SmallLayout();
::prefill::v1::PrefillEvent AcceptedEvent(const ::prefill::v1::KvLayout& layout, int num_lanes);
// The bytes of every block are made from layer and block, so that a mix-up changes them.
::prefill::v1::PrefillEvent FrameEvent(const ::prefill::v1::KvLayout& layout, uint32_t lane,
                                       uint64_t sequence, uint32_t layer, uint32_t first_block,
                                       uint32_t num_blocks);
::prefill::v1::PrefillEvent ResultEvent(const std::vector<uint64_t>& frames_per_lane);
void SetChecksum(::prefill::v1::KvFrame& frame);

}  // namespace prefilld::client

#endif  // PREFILLD_TESTS_CLIENT_SCRIPTED_SERVER_H_
