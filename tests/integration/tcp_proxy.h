#ifndef PREFILLD_TESTS_INTEGRATION_TCP_PROXY_H_
#define PREFILLD_TESTS_INTEGRATION_TCP_PROXY_H_

#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "tests/integration/tcp_socket.h"

namespace prefilld::integration {

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

#endif  // PREFILLD_TESTS_INTEGRATION_TCP_PROXY_H_
