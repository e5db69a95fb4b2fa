#include "proto/process/metrics_endpoint.h"

#include <microhttpd.h>
#include <prometheus/collectable.h>
#include <prometheus/text_serializer.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <map>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/time/clock.h"
#include "proto/wire/listening_sockets.h"

namespace prefilld::process {
namespace {

constexpr size_t kMaxConnections = 64;
// The connections above the maximum are those that are being closed.
constexpr unsigned kConnectionLimit = 2 * kMaxConnections;
constexpr unsigned kSilenceSeconds = 5;
constexpr absl::Duration kReaderIsGone = absl::Minutes(2);
// The memory of a connection bounds what a request's header may take.
constexpr size_t kConnectionBytes = 16 << 10;

absl::Status CannotBind(const std::string& address, absl::string_view reason) {
  return absl::UnavailableError(
      absl::StrCat("--metrics_listen=", address, " cannot be bound: ", reason));
}

MHD_Result Answer(MHD_Connection* connection, unsigned code, const char* content_type,
                  const std::string& body) {
  MHD_Response* response = MHD_create_response_from_buffer(
      body.size(), const_cast<char*>(body.data()), MHD_RESPMEM_MUST_COPY);
  if (response == nullptr) return MHD_NO;
  MHD_add_response_header(response, MHD_HTTP_HEADER_CONTENT_TYPE, content_type);
  const MHD_Result queued = MHD_queue_response(connection, code, response);
  MHD_destroy_response(response);
  return queued;
}

}  // namespace

// The open connections in the order in which they came. Only the daemon's thread uses it.
class MetricsEndpoint::Connections {
 public:
  // `mark` is where the daemon keeps the number of a connection for us.
  void Opened(MHD_Connection* connection, void** mark) {
    if (sockets_.size() >= kMaxConnections) CloseOldest();
    const MHD_ConnectionInfo* info =
        MHD_get_connection_info(connection, MHD_CONNECTION_INFO_CONNECTION_FD);
    sockets_.emplace(++last_, info->connect_fd);
    *mark = reinterpret_cast<void*>(last_);
  }

  void Closed(void** mark) { sockets_.erase(reinterpret_cast<uintptr_t>(*mark)); }

 private:
  // The daemon finds the socket at its end and closes it.
  void CloseOldest() {
    const auto oldest = sockets_.begin();
    shutdown(oldest->second, SHUT_RDWR);
    sockets_.erase(oldest);
  }

  uintptr_t last_ = 0;
  std::map<uintptr_t, int> sockets_;  // by number
};

absl::StatusOr<std::unique_ptr<MetricsEndpoint>> MetricsEndpoint::Create(
    const std::string& address, std::vector<std::shared_ptr<prometheus::Collectable>> collectables,
    std::shared_ptr<const std::atomic<bool>> live) {
  absl::StatusOr<wire::ListeningSockets> listening = wire::ListenOn(address);
  if (!listening.ok()) return CannotBind(address, listening.status().message());
  std::unique_ptr<MetricsEndpoint> endpoint(
      new MetricsEndpoint(std::move(collectables), std::move(live), listening->port));
  // A name may have several addresses; the first one is served.
  if (absl::Status started = endpoint->Start(listening->sockets.front().release()); !started.ok()) {
    return CannotBind(address, started.message());
  }
  return endpoint;
}

MetricsEndpoint::MetricsEndpoint(std::vector<std::shared_ptr<prometheus::Collectable>> collectables,
                                 std::shared_ptr<const std::atomic<bool>> live, int port)
    : collectables_(std::move(collectables)),
      live_(std::move(live)),
      port_(port),
      connections_(std::make_unique<Connections>()) {}

MetricsEndpoint::~MetricsEndpoint() {
  if (daemon_ != nullptr) MHD_stop_daemon(daemon_);
}

absl::Status MetricsEndpoint::Start(int socket) {
  const auto answer = +[](void* self, MHD_Connection* connection, const char* path,
                          const char* method, const char*, const char*, size_t*, void** page) {
    constexpr char kPlain[] = "text/plain; charset=utf-8";
    const absl::string_view asked = method;
    auto* const endpoint = static_cast<MetricsEndpoint*>(self);
    const bool asks_liveness = absl::string_view(path) == "/live" && endpoint->live_ != nullptr;
    if (absl::string_view(path) != "/metrics" && !asks_liveness) {
      return Answer(connection, MHD_HTTP_NOT_FOUND, kPlain, "only /metrics and /live are here\n");
    }
    if (asked != MHD_HTTP_METHOD_GET && asked != MHD_HTTP_METHOD_HEAD) {
      return Answer(connection, MHD_HTTP_METHOD_NOT_ALLOWED, kPlain, "GET and HEAD alone\n");
    }
    if (asks_liveness) {
      return *endpoint->live_
                 ? Answer(connection, MHD_HTTP_OK, kPlain, "live\n")
                 : Answer(connection, MHD_HTTP_SERVICE_UNAVAILABLE, kPlain, "not live\n");
    }
    if (asked == MHD_HTTP_METHOD_GET) {
      absl::MutexLock lock(&endpoint->mu_);
      *page = reinterpret_cast<void*>(++endpoint->pages_made_);
    }
    return Answer(connection, MHD_HTTP_OK, "text/plain; version=0.0.4; charset=utf-8",
                  endpoint->Page());
  };
  const auto completed =
      +[](void* self, MHD_Connection*, void** page, MHD_RequestTerminationCode how) {
        if (*page == nullptr || how != MHD_REQUEST_TERMINATED_COMPLETED_OK) return;
        static_cast<MetricsEndpoint*>(self)->PageWasRead(
            static_cast<int64_t>(reinterpret_cast<uintptr_t>(*page)));
      };
  const auto notice = +[](void* connections, MHD_Connection* connection, void** mark,
                          MHD_ConnectionNotificationCode code) {
    if (code == MHD_CONNECTION_NOTIFY_STARTED) {
      static_cast<Connections*>(connections)->Opened(connection, mark);
    } else {
      static_cast<Connections*>(connections)->Closed(mark);
    }
  };
  daemon_ = MHD_start_daemon(MHD_USE_EPOLL_INTERNAL_THREAD, 0, nullptr, nullptr, answer, this,
                             MHD_OPTION_LISTEN_SOCKET, socket, MHD_OPTION_CONNECTION_LIMIT,
                             kConnectionLimit, MHD_OPTION_CONNECTION_TIMEOUT, kSilenceSeconds,
                             MHD_OPTION_CONNECTION_MEMORY_LIMIT, kConnectionBytes,
                             MHD_OPTION_NOTIFY_CONNECTION, notice, connections_.get(),
                             MHD_OPTION_NOTIFY_COMPLETED, completed, this, MHD_OPTION_END);
  if (daemon_ != nullptr) return absl::OkStatus();
  close(socket);
  return absl::UnavailableError("the HTTP server does not start");
}

void MetricsEndpoint::PageWasRead(int64_t number) {
  absl::MutexLock lock(&mu_);
  last_page_read_ = std::max(last_page_read_, number);
  last_reading_ = absl::Now();
}

void MetricsEndpoint::AwaitReader(absl::Duration timeout) {
  absl::MutexLock lock(&mu_);
  if (absl::Now() - last_reading_ > kReaderIsGone) return;
  const int64_t next_page = pages_made_ + 1;
  const auto is_read = [this, next_page]()
                           ABSL_SHARED_LOCKS_REQUIRED(mu_) { return last_page_read_ >= next_page; };
  mu_.AwaitWithTimeout(absl::Condition(&is_read), timeout);
}

std::string MetricsEndpoint::Page() const {
  std::vector<prometheus::MetricFamily> families;
  for (const auto& collectable : collectables_) {
    std::vector<prometheus::MetricFamily> more = collectable->Collect();
    families.insert(families.end(), std::make_move_iterator(more.begin()),
                    std::make_move_iterator(more.end()));
  }
  return prometheus::TextSerializer().Serialize(families);
}

}  // namespace prefilld::process
