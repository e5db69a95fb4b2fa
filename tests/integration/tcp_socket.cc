#include "tests/integration/tcp_socket.h"

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

}  // namespace prefilld::integration
