#ifndef PREFILLD_TESTS_INTEGRATION_TCP_SOCKET_H_
#define PREFILLD_TESTS_INTEGRATION_TCP_SOCKET_H_

#include <string>
#include <utility>

namespace prefilld::integration {

// A file descriptor that is closed on destruction; -1 means none. Move-only.
class TcpSocket {
 public:
  TcpSocket() = default;
  explicit TcpSocket(int descriptor) : descriptor_(descriptor) {}
  TcpSocket(TcpSocket&& other) noexcept : descriptor_(std::exchange(other.descriptor_, -1)) {}
  TcpSocket& operator=(TcpSocket&& other) noexcept {
    std::swap(descriptor_, other.descriptor_);
    return *this;
  }
  ~TcpSocket();

  // Connects to "a.b.c.d:port". Aborts when refused.
  static TcpSocket Connect(const std::string& address);
  // Listens on a free port of 127.0.0.1, which it writes to `port`.
  static TcpSocket Listen(int& port);

  int descriptor() const { return descriptor_; }

 private:
  int descriptor_ = -1;
};

}  // namespace prefilld::integration

#endif  // PREFILLD_TESTS_INTEGRATION_TCP_SOCKET_H_
