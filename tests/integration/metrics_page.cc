#include "tests/integration/metrics_page.h"

#include <stdlib.h>
#include <sys/socket.h>

#include <cstdio>

#include "absl/time/clock.h"
#include "tests/integration/tcp.h"

namespace prefilld::integration {

MetricsPage::MetricsPage(const std::string& address, const std::string& path) {
  const TcpSocket socket = TcpSocket::Connect(address);
  const std::string request = "GET " + path + " HTTP/1.0\r\nHost: localhost\r\n\r\n";
  send(socket.descriptor(), request.data(), request.size(), MSG_NOSIGNAL);
  char buffer[4096];
  ssize_t size;
  while ((size = recv(socket.descriptor(), buffer, sizeof(buffer), 0)) > 0) {
    text_.append(buffer, static_cast<size_t>(size));
  }
}

double MetricsPage::Value(const std::string& sample) const {
  const size_t at = text_.find("\n" + sample + " ");
  if (at == std::string::npos) {
    std::fprintf(stderr, "no sample %s in\n%s", sample.c_str(), text_.c_str());
    abort();
  }
  return std::stod(text_.substr(at + sample.size() + 2));
}

bool WaitForMetrics(const std::string& address, absl::Duration timeout,
                    const std::function<bool(const MetricsPage&)>& condition) {
  const absl::Time deadline = absl::Now() + timeout;
  while (!condition(MetricsPage(address))) {
    if (absl::Now() > deadline) return false;
    absl::SleepFor(absl::Milliseconds(5));
  }
  return true;
}

}  // namespace prefilld::integration
