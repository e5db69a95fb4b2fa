#include "proto/process/certificate_watch.h"

#include <prometheus/collectable.h>
#include <prometheus/metric_family.h>

#include <atomic>
#include <cstdint>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/clock.h"
#include "proto/process/log.h"

namespace prefilld::process {
namespace {

constexpr absl::Duration kWarnBefore = absl::Hours(14 * 24);
constexpr absl::Duration kWarnEvery = absl::Hours(24);

LogFields ExpiryFields(const std::string& file, absl::Time expiry) {
  return {{"file", file},
          {"expires", absl::FormatTime("%Y-%m-%dT%H:%M:%SZ", expiry, absl::UTCTimeZone())},
          {"days_left", absl::ToDoubleHours(expiry - absl::Now()) / 24}};
}

}  // namespace

class CertificateWatch::Metrics final : public prometheus::Collectable {
 public:
  void SetExpiry(absl::Time expiry) { expiry_s_ = absl::ToUnixSeconds(expiry); }
  void SetClientExpiry(absl::Time expiry) { client_expiry_s_ = absl::ToUnixSeconds(expiry); }
  void CountReload() { ++reloaded_; }
  void CountRefusal() { ++refused_; }
  void SetServerRefused(bool refused) { server_refused_ = refused; }
  void SetClientRefused(bool refused) { client_refused_ = refused; }

  std::vector<prometheus::MetricFamily> Collect() const override {
    std::vector<prometheus::MetricFamily> families;
    if (expiry_s_ != kNone) {
      families.push_back(Gauge("prefilld_certificate_expiry_timestamp_seconds",
                               "When the first certificate of --tls_cert expires, in seconds "
                               "since 1970.",
                               expiry_s_));
    }
    if (client_expiry_s_ != kNone) {
      families.push_back(Gauge("prefilld_client_certificate_expiry_timestamp_seconds",
                               "When the certificate expires that is shown to prefilld, in "
                               "seconds since 1970.",
                               client_expiry_s_));
    }
    if (families.empty()) return families;
    families.push_back(Reloads());
    families.push_back(Refused());
    return families;
  }

 private:
  static constexpr int64_t kNone = -1;

  static prometheus::MetricFamily Gauge(const char* name, const char* help, int64_t value) {
    prometheus::MetricFamily gauge;
    gauge.name = name;
    gauge.help = help;
    gauge.type = prometheus::MetricType::Gauge;
    gauge.metric.emplace_back().gauge.value = static_cast<double>(value);
    return gauge;
  }

  prometheus::MetricFamily Refused() const {
    prometheus::MetricFamily refused;
    refused.name = "prefilld_certificates_refused";
    refused.help =
        "1 while the TLS files of this server, or those of calls that go out, are not valid.";
    refused.type = prometheus::MetricType::Gauge;
    const auto add = [&refused](const char* side, bool is_refused) {
      prometheus::ClientMetric& metric = refused.metric.emplace_back();
      metric.label.push_back({"certificate", side});
      metric.gauge.value = is_refused ? 1 : 0;
    };
    if (expiry_s_ != kNone) add("server", server_refused_);
    if (client_expiry_s_ != kNone) add("client", client_refused_);
    return refused;
  }

  prometheus::MetricFamily Reloads() const {
    prometheus::MetricFamily reloads;
    reloads.name = "prefilld_certificate_reloads_total";
    reloads.help = "Times that changed TLS files were read, by whether they were valid.";
    reloads.type = prometheus::MetricType::Counter;
    for (const auto& [result, count] : {std::pair("ok", &reloaded_), {"refused", &refused_}}) {
      prometheus::ClientMetric& metric = reloads.metric.emplace_back();
      metric.label.push_back({"result", result});
      metric.counter.value = static_cast<double>(count->load());
    }
    return reloads;
  }

  std::atomic<int64_t> expiry_s_ = kNone;
  std::atomic<int64_t> client_expiry_s_ = kNone;
  std::atomic<int64_t> reloaded_ = 0;
  std::atomic<int64_t> refused_ = 0;
  std::atomic<bool> server_refused_ = false;
  std::atomic<bool> client_refused_ = false;
};

CertificateWatch::CertificateWatch(wire::ServerCertificates* certificates,
                                   std::optional<wire::ChannelTls> client)
    : certificates_(certificates), metrics_(std::make_shared<Metrics>()) {
  if (client.has_value() && !client->cert_file.empty()) client_ = *std::move(client);
  if (certificates_ != nullptr) metrics_->SetExpiry(certificates_->expiry());
  // The versions are older than what was read, so that a change between the two is seen.
  if (certificates_ != nullptr) read_ = certificates_->loaded_versions();
  client_read_ = ClientVersions();
  read_ += client_read_;
  if (client_.has_value()) ReadClient();
}

CertificateWatch::~CertificateWatch() = default;

std::shared_ptr<prometheus::Collectable> CertificateWatch::metrics() const { return metrics_; }

std::vector<FileWatch::Subject> CertificateWatch::Subjects() {
  if (certificates_ == nullptr && !client_.has_value()) return {};
  return {{.versions = [this] { return ServerVersions() + ClientVersions(); },
           .read = read_,
           .reload =
               [this](bool ordered) {
                 if (certificates_ != nullptr) ReloadServer(/*say_unchanged=*/ordered);
                 if (client_.has_value()) ReadClient();
               },
           .at_each_look = [this](absl::Time now) { WarnOfExpiry(now); }}};
}

std::string CertificateWatch::ServerVersions() const {
  return certificates_ == nullptr ? "" : certificates_->FileVersions();
}

std::string CertificateWatch::ClientVersions() const {
  if (!client_.has_value()) return "";
  return wire::FileVersions({client_->ca_file, client_->cert_file, client_->key_file});
}

void CertificateWatch::ReloadServer(bool say_unchanged) {
  const absl::StatusOr<bool> changed = certificates_->Reload();
  metrics_->SetServerRefused(!changed.ok());
  if (!changed.ok()) {
    metrics_->CountRefusal();
    LogEvent(LogLevel::kError, "certificates_refused",
             {{"status", std::string(changed.status().message())}});
  } else if (*changed) {
    metrics_->CountReload();
    metrics_->SetExpiry(certificates_->expiry());
    LogEvent(LogLevel::kInfo, "certificates_reloaded",
             ExpiryFields("--tls_cert", certificates_->expiry()));
  } else if (say_unchanged) {
    LogEvent(LogLevel::kInfo, "certificates_unchanged",
             ExpiryFields("--tls_cert", certificates_->expiry()));
  }
}

// The channels read the files themselves (MakeChannelCredentials); this is for the operator.
void CertificateWatch::ReadClient() {
  std::string versions = ClientVersions();  // older than what is read
  const absl::StatusOr<absl::Time> expiry = wire::ChannelCertificateExpiry(*client_);
  metrics_->SetClientRefused(!expiry.ok());
  if (!expiry.ok()) {
    metrics_->CountRefusal();
    LogEvent(LogLevel::kError, "certificates_refused",
             {{"status", std::string(expiry.status().message())}});
    return;
  }
  client_expiry_ = absl::ToUnixSeconds(*expiry);
  metrics_->SetClientExpiry(*expiry);
  if (versions == client_read_) return;
  client_read_ = std::move(versions);
  metrics_->CountReload();
  LogEvent(LogLevel::kInfo, "certificates_reloaded", ExpiryFields(client_->cert_file, *expiry));
}

void CertificateWatch::WarnOfExpiry(absl::Time now) {
  if (now < next_warning_) return;
  if (certificates_ != nullptr) WarnOfExpiry("--tls_cert", certificates_->expiry(), now);
  if (client_.has_value()) {
    WarnOfExpiry(client_->cert_file, absl::FromUnixSeconds(client_expiry_), now);
  }
}

void CertificateWatch::WarnOfExpiry(const std::string& file, absl::Time expiry, absl::Time now) {
  if (expiry - now > kWarnBefore) return;
  next_warning_ = now + kWarnEvery;
  if (now < expiry) {
    LogEvent(LogLevel::kWarning, "certificate_expires_soon", ExpiryFields(file, expiry));
  } else {
    LogEvent(LogLevel::kError, "certificate_expired", ExpiryFields(file, expiry));
  }
}

}  // namespace prefilld::process
