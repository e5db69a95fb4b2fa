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

constexpr absl::Duration kPeriod = absl::Seconds(1);
constexpr absl::Duration kWarnBefore = absl::Hours(14 * 24);
constexpr absl::Duration kWarnEvery = absl::Hours(24);

LogFields ExpiryFields(absl::Time expiry) {
  return {{"expires", absl::FormatTime("%Y-%m-%dT%H:%M:%SZ", expiry, absl::UTCTimeZone())},
          {"days_left", absl::ToDoubleHours(expiry - absl::Now()) / 24}};
}

}  // namespace

class CertificateWatch::Metrics final : public prometheus::Collectable {
 public:
  void SetExpiry(absl::Time expiry) { expiry_s_ = absl::ToUnixSeconds(expiry); }
  void Count(bool refused) { ++(refused ? refused_ : reloaded_); }

  std::vector<prometheus::MetricFamily> Collect() const override {
    if (expiry_s_ == kNoTls) return {};
    prometheus::MetricFamily expiry;
    expiry.name = "prefilld_certificate_expiry_timestamp_seconds";
    expiry.help = "When the first certificate of --tls_cert expires, in seconds since 1970.";
    expiry.type = prometheus::MetricType::Gauge;
    expiry.metric.emplace_back().gauge.value = static_cast<double>(expiry_s_);
    prometheus::MetricFamily reloads;
    reloads.name = "prefilld_certificate_reloads_total";
    reloads.help = "Times that changed TLS files were read, by whether they were valid.";
    reloads.type = prometheus::MetricType::Counter;
    for (const auto& [result, count] : {std::pair("ok", &reloaded_), {"refused", &refused_}}) {
      prometheus::ClientMetric& metric = reloads.metric.emplace_back();
      metric.label.push_back({"result", result});
      metric.counter.value = static_cast<double>(count->load());
    }
    return {expiry, reloads};
  }

 private:
  static constexpr int64_t kNoTls = -1;

  std::atomic<int64_t> expiry_s_ = kNoTls;
  std::atomic<int64_t> reloaded_ = 0;
  std::atomic<int64_t> refused_ = 0;
};

CertificateWatch::CertificateWatch(wire::ServerCertificates* certificates)
    : certificates_(certificates), metrics_(std::make_shared<Metrics>()) {
  if (certificates_ == nullptr) return;
  metrics_->SetExpiry(certificates_->expiry());
  thread_.emplace([this] { Run(); });
}

CertificateWatch::~CertificateWatch() {
  stop_.Notify();
  if (thread_.has_value()) thread_->join();
}

std::shared_ptr<prometheus::Collectable> CertificateWatch::metrics() const { return metrics_; }

void CertificateWatch::Run() {
  // Files that are being written change from one look to the next.
  std::string read = certificates_->FileVersions();
  std::string seen = read;
  do {
    const std::string now = certificates_->FileVersions();
    if (now == seen && now != read) {
      read = now;
      Reload(/*say_unchanged=*/false);
    }
    seen = now;
    WarnOfExpiry(absl::Now());
  } while (!stop_.WaitForNotificationWithTimeout(kPeriod));
}

void CertificateWatch::ReloadNow() {
  if (certificates_ != nullptr) return Reload(/*say_unchanged=*/true);
  LogEvent(LogLevel::kInfo, "nothing_to_reload", {{"tls", "off"}});
}

void CertificateWatch::Reload(bool say_unchanged) {
  absl::MutexLock lock(&reload_mu_);
  const absl::StatusOr<bool> changed = certificates_->Reload();
  if (!changed.ok()) {
    metrics_->Count(/*refused=*/true);
    LogEvent(LogLevel::kError, "certificates_refused",
             {{"status", std::string(changed.status().message())}});
  } else if (*changed) {
    metrics_->Count(/*refused=*/false);
    metrics_->SetExpiry(certificates_->expiry());
    LogEvent(LogLevel::kInfo, "certificates_reloaded", ExpiryFields(certificates_->expiry()));
  } else if (say_unchanged) {
    LogEvent(LogLevel::kInfo, "certificates_unchanged", ExpiryFields(certificates_->expiry()));
  }
}

void CertificateWatch::WarnOfExpiry(absl::Time now) {
  const absl::Time expiry = certificates_->expiry();
  if (now < next_warning_ || expiry - now > kWarnBefore) return;
  next_warning_ = now + kWarnEvery;
  if (now < expiry) {
    LogEvent(LogLevel::kWarning, "certificate_expires_soon", ExpiryFields(expiry));
  } else {
    LogEvent(LogLevel::kError, "certificate_expired", ExpiryFields(expiry));
  }
}

}  // namespace prefilld::process
