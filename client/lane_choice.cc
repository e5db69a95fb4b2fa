#include "client/lane_choice.h"

#include <netdb.h>
#include <sys/socket.h>

#include <memory>
#include <optional>

#include "absl/strings/strip.h"
#include "proto/wire/host_port.h"
#include "proto/wire/kv_layout.h"

namespace prefilld::client {

using ::prefill::v1::DTYPE_UNSPECIFIED;
using ::prefill::v1::KvLayout;
using ::prefill::v1::KvLayoutRequest;
using ::prefill::v1::ServerInfo;

// A server may say anything of itself, and sizes must not overflow.
uint64_t KvBytesPerToken(const ServerInfo& server, const KvLayoutRequest& wish) {
  constexpr uint32_t kMaxHeads = 1024, kMaxHeadDim = 1024;  // no model comes near these limits
  KvLayout layout;
  layout.set_num_layers(server.num_layers());
  layout.set_num_heads(wish.num_heads() > 0 ? wish.num_heads() : server.num_kv_heads());
  layout.set_head_dim(server.head_dim());
  layout.set_dtype(wish.dtype() != DTYPE_UNSPECIFIED ? wish.dtype() : server.native_dtype());
  layout.set_block_tokens(wish.block_tokens() > 0 ? wish.block_tokens()
                                                  : wire::kDefaultBlockTokens);
  layout.set_scales(wish.scales());
  if (layout.num_heads() > kMaxHeads || layout.head_dim() > kMaxHeadDim ||
      !wire::IsBlockTokens(layout.block_tokens())) {
    return 0;
  }
  return KvBytesPerToken(layout);
}

uint64_t KvBytesPerToken(const KvLayout& layout) {
  return layout.num_layers() * static_cast<uint64_t>(wire::KvPairBytes(layout)) /
         layout.block_tokens();
}

uint64_t TokensToCome(const KvLayoutRequest& wish, uint64_t num_tokens) {
  const uint64_t block_tokens =
      wish.block_tokens() > 0 ? wish.block_tokens() : wire::kDefaultBlockTokens;
  const uint64_t present = wish.first_block() * block_tokens;
  return present < num_tokens ? num_tokens - present : 0;
}

// A machine may have an address of each family.
bool StandsForSeveral(const std::string& address) {
  const std::optional<wire::HostPort> host_port =
      wire::ParseHostPort(absl::StripPrefix(address, "dns:///"));
  if (!host_port.has_value() || !host_port->is_name) return false;
  addrinfo hints = {};
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  if (getaddrinfo(host_port->host.c_str(), nullptr, &hints, &found) != 0) return false;
  const std::unique_ptr<addrinfo, decltype(&freeaddrinfo)> list(found, &freeaddrinfo);
  int ipv4 = 0, ipv6 = 0;
  for (const addrinfo* entry = found; entry != nullptr; entry = entry->ai_next) {
    ++(entry->ai_family == AF_INET6 ? ipv6 : ipv4);
  }
  return ipv4 > 1 || ipv6 > 1;
}

}  // namespace prefilld::client
