#include "tests/integration/tcp.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstdio>

namespace prefilld::integration {

TcpSocket::~TcpSocket() {
  if (descriptor_ >= 0) close(descriptor_);
}

TcpSocket TcpSocket::Connect(const std::string& address) {
  const size_t colon = address.rfind(':');
  sockaddr_in peer = {};
  peer.sin_family = AF_INET;
  peer.sin_port = htons(static_cast<uint16_t>(std::stoi(address.substr(colon + 1))));
  inet_pton(AF_INET, address.substr(0, colon).c_str(), &peer.sin_addr);
  TcpSocket socket(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (connect(socket.descriptor(), reinterpret_cast<sockaddr*>(&peer), sizeof(peer)) != 0) {
    std::perror(address.c_str());
    abort();
  }
  return socket;
}

TcpSocket TcpSocket::Listen(int& port) {
  TcpSocket socket(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_in self = {};
  self.sin_family = AF_INET;
  self.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof(self);
  if (bind(socket.descriptor(), reinterpret_cast<sockaddr*>(&self), size) != 0 ||
      listen(socket.descriptor(), 16) != 0 ||
      getsockname(socket.descriptor(), reinterpret_cast<sockaddr*>(&self), &size) != 0) {
    std::perror("listen");
    abort();
  }
  port = ntohs(self.sin_port);
  return socket;
}

namespace {

// Forwards until one side closes.
void Forward(int from, int to) {
  std::vector<char> buffer(64 << 10);
  ssize_t size;
  while ((size = recv(from, buffer.data(), buffer.size(), 0)) > 0) {
    const char* at = buffer.data();
    while (size > 0) {
      const ssize_t sent = send(to, at, static_cast<size_t>(size), MSG_NOSIGNAL);
      if (sent <= 0) break;
      at += sent;
      size -= sent;
    }
    if (size > 0) break;
  }
  shutdown(from, SHUT_RDWR);
  shutdown(to, SHUT_RDWR);
}

}  // namespace

TcpProxy::TcpProxy(const std::string& target) : target_(target) {
  int port = 0;
  listener_ = TcpSocket::Listen(port);
  address_ = "127.0.0.1:" + std::to_string(port);
  acceptor_ = std::thread([this] { Accept(); });
}

TcpProxy::~TcpProxy() {
  shutdown(listener_.descriptor(), SHUT_RDWR);
  acceptor_.join();
  Cut();
}

void TcpProxy::Accept() {
  while (true) {
    TcpSocket client(accept(listener_.descriptor(), nullptr, nullptr));
    if (client.descriptor() < 0) return;
    auto connection = std::make_unique<Connection>();
    connection->client = std::move(client);
    connection->target = TcpSocket::Connect(target_);
    const int a = connection->client.descriptor();
    const int b = connection->target.descriptor();
    connection->to_target = std::thread(Forward, a, b);
    connection->to_client = std::thread(Forward, b, a);
    absl::MutexLock lock(&mu_);
    connections_.push_back(std::move(connection));
  }
}

void TcpProxy::Cut() {
  absl::MutexLock lock(&mu_);
  for (const auto& connection : connections_) {
    shutdown(connection->client.descriptor(), SHUT_RDWR);
    shutdown(connection->target.descriptor(), SHUT_RDWR);
    connection->to_target.join();
    connection->to_client.join();
  }
  connections_.clear();
}

}  // namespace prefilld::integration
