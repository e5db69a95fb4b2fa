#ifndef PREFILLD_TESTS_INTEGRATION_TCP_H_
#define PREFILLD_TESTS_INTEGRATION_TCP_H_

#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

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

// A TCP proxy between two processes whose connections can be cut.
class TcpProxy {
 public:
  explicit TcpProxy(const std::string& target);
  ~TcpProxy();

  const std::string& address() const { return address_; }
  // Resets the open connections. Later ones go through again.
  void Cut();

 private:
  struct Connection {
    TcpSocket client;
    TcpSocket target;
    std::thread to_target;
    std::thread to_client;
  };

  void Accept();

  const std::string target_;
  std::string address_;
  TcpSocket listener_;
  absl::Mutex mu_;
  std::vector<std::unique_ptr<Connection>> connections_ ABSL_GUARDED_BY(mu_);
  std::thread acceptor_;
};

}  // namespace prefilld::integration

#endif  // PREFILLD_TESTS_INTEGRATION_TCP_H_
