#include "tests/client/scripted_server.h"

#include <utility>

#include "client/transfer_check.h"
#include "grpcpp/security/server_credentials.h"
#include "grpcpp/server_builder.h"
#include "grpcpp/server_context.h"
#include "proto/wire/kv_layout.h"
#include "xxhash.h"

namespace prefilld::client {

using ::prefill::v1::AttachLaneRequest;
using ::prefill::v1::KvFrame;
using ::prefill::v1::KvLayout;
using ::prefill::v1::PrefillEvent;
using ::prefill::v1::PrefillRequest;

ScriptedServer::ScriptedServer(PrefillScript prefill, LaneScript lane, ReceiverScript receiver)
    : prefill_(std::move(prefill)), lane_(std::move(lane)), receiver_(std::move(receiver)) {
  grpc::ServerBuilder builder;
  int port = 0;
  builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
  builder.RegisterService(this);
  server_ = builder.BuildAndStart();
  address_ = "127.0.0.1:" + std::to_string(port);
}

ScriptedServer::~ScriptedServer() {
  server_->Shutdown(std::chrono::system_clock::now());
  server_->Wait();
}

std::vector<std::string> ScriptedServer::peers() {
  std::lock_guard<std::mutex> lock(mu_);
  return peers_;
}

void ScriptedServer::NotePeer(const grpc::ServerContext& context) {
  std::lock_guard<std::mutex> lock(mu_);
  peers_.push_back(context.peer());
}

grpc::Status ScriptedServer::Prefill(grpc::ServerContext* context, const PrefillRequest* request,
                                     PrefillWriter* writer) {
  NotePeer(*context);
  return prefill_(*context, *request, *writer);
}

grpc::Status ScriptedServer::AttachLane(grpc::ServerContext* context,
                                        const AttachLaneRequest* request, PrefillWriter* writer) {
  NotePeer(*context);
  return lane_ ? lane_(*request, *writer) : grpc::Status(grpc::StatusCode::NOT_FOUND, "no lanes");
}

grpc::Status ScriptedServer::AttachReceiver(grpc::ServerContext* context,
                                            const ::prefill::v1::AttachReceiverRequest* request,
                                            PrefillWriter* writer) {
  NotePeer(*context);
  return receiver_ ? receiver_(*request, *writer)
                   : grpc::Status(grpc::StatusCode::NOT_FOUND, "no receivers");
}

grpc::Status ScriptedServer::GetServerInfo(grpc::ServerContext*,
                                           const ::prefill::v1::GetServerInfoRequest*,
                                           ::prefill::v1::ServerInfo* info) {
  info->set_model_fingerprint("f00d");
  return grpc::Status::OK;
}

PrefillRequest SmallRequest() {
  PrefillRequest request;
  for (uint32_t id = 0; id < 40; ++id) request.add_token_ids(id);
  return request;
}

KvLayout SmallLayout() {
  KvLayout layout;
  layout.set_model_fingerprint("f00d");
  layout.set_dtype(::prefill::v1::DTYPE_FP32);
  layout.set_order(::prefill::v1::KV_ORDER_NHD);
  layout.set_block_tokens(16);
  layout.set_num_layers(3);
  layout.set_num_kv_heads(2);
  layout.set_num_heads(2);
  layout.set_head_dim(8);
  layout.set_keys_rotated(true);
  layout.set_num_tokens(40);
  layout.set_num_blocks(3);
  return layout;
}

PrefillEvent AcceptedEvent(const KvLayout& layout, int num_lanes) {
  PrefillEvent event;
  event.mutable_accepted()->set_request_id("r1");
  *event.mutable_accepted()->mutable_layout() = layout;
  event.mutable_accepted()->set_num_lanes(num_lanes);
  return event;
}

PrefillEvent FrameEvent(const KvLayout& layout, uint32_t lane, uint64_t sequence, uint32_t layer,
                        uint32_t first_block, uint32_t num_blocks) {
  PrefillEvent event;
  KvFrame& frame = *event.mutable_kv_frame();
  frame.set_lane(lane);
  frame.set_sequence(sequence);
  frame.set_layer(layer);
  frame.set_first_block(first_block);
  frame.set_num_blocks(num_blocks);
  frame.set_layers_computed(layer + 1);
  std::string& payload = *frame.mutable_payload();
  payload.resize(num_blocks * wire::KvPairBytes(layout));
  for (size_t i = 0; i < payload.size(); ++i) {
    payload[i] = static_cast<char>(i * 31 + layer * 7 + first_block * 13);
  }
  SetChecksum(frame);
  return event;
}

PrefillEvent ResultEvent(const std::vector<uint64_t>& frames_per_lane) {
  PrefillEvent event;
  for (uint64_t frames : frames_per_lane) event.mutable_result()->add_frames_per_lane(frames);
  event.mutable_result()->mutable_first_token()->set_token_id(7);
  return event;
}

void SetChecksum(KvFrame& frame) {
  frame.set_checksum(XXH3_64bits(frame.payload().data(), frame.payload().size()));
}

}  // namespace prefilld::client
