// Tests that certificates are renewed while a server runs, and that bad ones change nothing.
#include <fstream>
#include <memory>
#include <string>

#include <gmock/gmock.h>
#include <grpcpp/channel.h>
#include <grpcpp/security/credentials.h>
#include <grpcpp/server.h>
#include <gtest/gtest.h>
#include <prometheus/collectable.h>
#include <prometheus/metric_family.h>
#include <prometheus/text_serializer.h>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "proto/process/certificate_watch.h"
#include "proto/wire/channel.h"
#include "proto/wire/listener.h"
#include "tests/proto/test_certificate.h"

namespace prefilld::process {
namespace {

using ::testing::HasSubstr;

// A CertificateWatch whose files are watched.
class WatchedCertificates : public CertificateWatch {
 public:
  using CertificateWatch::CertificateWatch;
  void ReloadNow() { EXPECT_TRUE(files_.ReloadNow(absl::Seconds(30))); }

 private:
  FileWatch files_{Subjects()};
};

class Renewal : public ::testing::Test {
 protected:
  // Starts a server with the files of own_, which asks callers for a certificate as well.
  void SetUp() override {
    auto listener = wire::Listener::Create({.address = "127.0.0.1:0,127.0.0.2:0",
                                            .tls = {.cert_file = own_.cert_file(),
                                                    .key_file = own_.key_file(),
                                                    .client_ca_file = own_.cert_file()},
                                            .max_request_bytes = 1 << 20,
                                            .max_streams = 4},
                                           {});
    ASSERT_TRUE(listener.ok()) << listener.status();
    listener_ = *std::move(listener);
  }

  // Tells whether a caller that shows and trusts this certificate gets a connection.
  bool Connects(const TestCertificate& certificate, absl::Duration timeout = absl::Seconds(1)) {
    const auto channel = wire::OpenChannel(OptionsOf(certificate));
    return channel.ok() && (*channel)->WaitForConnected(absl::ToChronoTime(absl::Now() + timeout));
  }

  wire::ChannelOptions OptionsOf(const TestCertificate& certificate) const {
    return {.address = absl::StrCat("127.0.0.1:", listener_->port()),
            .tls = wire::ChannelTls{.ca_file = certificate.cert_file(),
                                    .cert_file = certificate.cert_file(),
                                    .key_file = certificate.key_file(),
                                    .server_name = ""}};
  }

  static std::string Page(const CertificateWatch& watch) {
    return prometheus::TextSerializer().Serialize(watch.metrics()->Collect());
  }

  template <typename Condition>
  static bool Soon(const Condition& condition) {
    const absl::Time deadline = absl::Now() + absl::Seconds(15);
    while (!condition()) {
      if (absl::Now() > deadline) return false;
      absl::SleepFor(absl::Milliseconds(50));
    }
    return true;
  }

  const TestCertificate own_;
  const TestCertificate before_;  // what own_ holds at first
  const TestCertificate after_;
  std::unique_ptr<wire::Listener> listener_;

 public:
  Renewal() { own_.ReplaceWith(before_); }
};

TEST_F(Renewal, NewFilesAreServedSoon) {
  const WatchedCertificates watch(listener_->certificates());
  EXPECT_TRUE(Connects(before_, absl::Seconds(10)));
  EXPECT_FALSE(Connects(after_));
  own_.ReplaceWith(after_);
  EXPECT_TRUE(Soon([&] { return Connects(after_); }));
  EXPECT_FALSE(Connects(before_));
  EXPECT_THAT(Page(watch), HasSubstr("prefilld_certificate_reloads_total{result=\"ok\"} 1\n"));
}

TEST_F(Renewal, NewFilesAreServedThoughTheyCameBeforeTheFirstLook) {
  own_.ReplaceWith(after_);
  const WatchedCertificates watch(listener_->certificates());
  EXPECT_TRUE(Soon([&] { return Connects(after_); }));
}

TEST_F(Renewal, AServerMayAskCallersForNothing) {
  const TestCertificate served;
  const auto listener = wire::Listener::Create({.address = "127.0.0.1:0",
                                                .tls = {.cert_file = served.cert_file(),
                                                        .key_file = served.key_file(),
                                                        .client_ca_file = ""},
                                                .max_request_bytes = 1 << 20,
                                                .max_streams = 4},
                                               {});
  ASSERT_TRUE(listener.ok()) << listener.status();
  const auto connects = [&](const TestCertificate& trusted) {
    const auto channel = wire::OpenChannel(
        {.address = absl::StrCat("127.0.0.1:", (*listener)->port()),
         .tls = wire::ChannelTls{
             .ca_file = trusted.cert_file(), .cert_file = "", .key_file = "", .server_name = ""}});
    return channel.ok() &&
           (*channel)->WaitForConnected(absl::ToChronoTime(absl::Now() + absl::Seconds(10)));
  };
  EXPECT_TRUE(connects(served));
  served.ReplaceWith(after_);
  WatchedCertificates((*listener)->certificates()).ReloadNow();
  EXPECT_TRUE(connects(after_));
}

TEST_F(Renewal, AnOperatorsWordIsEnough) {
  WatchedCertificates watch(listener_->certificates());
  own_.ReplaceWith(after_);
  watch.ReloadNow();
  EXPECT_TRUE(Connects(after_, absl::Seconds(10)));
}

TEST_F(Renewal, FilesThatAreNotValidChangeNothing) {
  WatchedCertificates watch(listener_->certificates());
  const TestCertificate past(-absl::Hours(48), -absl::Hours(24));
  own_.ReplaceWith(past);
  EXPECT_TRUE(Soon([&] {
    return Page(watch).find("prefilld_certificate_reloads_total{result=\"refused\"} 1\n") !=
           std::string::npos;
  }));
  EXPECT_TRUE(Connects(before_, absl::Seconds(10)));
  EXPECT_THAT(Page(watch), HasSubstr("prefilld_certificates_refused{certificate=\"server\"} 1\n"));
  std::ofstream(own_.cert_file()) << "half a certif";
  watch.ReloadNow();
  EXPECT_TRUE(Connects(before_, absl::Seconds(10)));
  EXPECT_THAT(Page(watch), HasSubstr("prefilld_certificates_refused{certificate=\"server\"} 1\n"));
  own_.ReplaceWith(before_);
  watch.ReloadNow();
  EXPECT_THAT(Page(watch), HasSubstr("prefilld_certificates_refused{certificate=\"server\"} 0\n"));
}

TEST_F(Renewal, FilesOfCallsThatGoOutAreCountedAndThoseThatAreNotValidAreTold) {
  const TestCertificate caller;
  WatchedCertificates watch(nullptr, OptionsOf(caller).tls);
  watch.ReloadNow();
  EXPECT_THAT(Page(watch), HasSubstr("prefilld_certificate_reloads_total{result=\"ok\"} 0\n"))
      << "they are those of the start";
  caller.ReplaceWith(after_);
  watch.ReloadNow();
  EXPECT_THAT(Page(watch), HasSubstr("prefilld_certificate_reloads_total{result=\"ok\"} 1\n"));
  EXPECT_THAT(Page(watch), HasSubstr("prefilld_certificates_refused{certificate=\"client\"} 0\n"));
  std::ofstream(caller.cert_file()) << "half a certif";
  watch.ReloadNow();
  EXPECT_THAT(Page(watch), HasSubstr("prefilld_certificates_refused{certificate=\"client\"} 1\n"));
  caller.ReplaceWith(before_);
  watch.ReloadNow();
  EXPECT_THAT(Page(watch), HasSubstr("prefilld_certificate_reloads_total{result=\"ok\"} 2\n"));
  EXPECT_THAT(Page(watch), HasSubstr("prefilld_certificates_refused{certificate=\"client\"} 0\n"));
}

TEST_F(Renewal, AChannelShowsAndTrustsNewFiles) {
  WatchedCertificates watch(listener_->certificates());
  const TestCertificate caller;
  caller.ReplaceWith(before_);
  const auto credentials = wire::MakeChannelCredentials(OptionsOf(caller).tls);
  ASSERT_TRUE(credentials.ok()) << credentials.status();
  own_.ReplaceWith(after_);
  watch.ReloadNow();
  caller.ReplaceWith(after_);
  const auto channel = wire::OpenChannel(OptionsOf(caller), *credentials);
  EXPECT_TRUE(channel->WaitForConnected(absl::ToChronoTime(absl::Now() + absl::Seconds(20))));
}

TEST_F(Renewal, TheMetricTellsWhenTheCertificateExpires) {
  const WatchedCertificates watch(listener_->certificates());
  double expiry = 0;
  for (const prometheus::MetricFamily& family : watch.metrics()->Collect()) {
    if (family.name == "prefilld_certificate_expiry_timestamp_seconds") {
      expiry = family.metric.front().gauge.value;
    }
  }
  const auto expected = static_cast<double>(absl::ToUnixSeconds(absl::Now() + absl::Hours(24)));
  EXPECT_NEAR(expiry, expected, 60);
}

TEST_F(Renewal, TheMetricTellsWhenTheCertificateOfCallsThatGoOutExpires) {
  const TestCertificate caller;
  const WatchedCertificates watch(nullptr, OptionsOf(caller).tls);
  const auto expiry_is = [&watch](absl::Duration from_now) {
    for (const prometheus::MetricFamily& family : watch.metrics()->Collect()) {
      EXPECT_NE(family.name, "prefilld_certificate_expiry_timestamp_seconds");
      if (family.name != "prefilld_client_certificate_expiry_timestamp_seconds") continue;
      const absl::Time expiry =
          absl::FromUnixSeconds(static_cast<int64_t>(family.metric.front().gauge.value));
      return absl::AbsDuration(expiry - absl::Now() - from_now) < absl::Minutes(1);
    }
    return false;
  };
  EXPECT_TRUE(expiry_is(absl::Hours(24)));
  caller.ReplaceWith(TestCertificate(-absl::Hours(1), absl::Hours(300)));
  EXPECT_TRUE(Soon([&] { return expiry_is(absl::Hours(300)); }));
}

TEST(CertificateWatch, WithoutTlsHasNothingToDo) {
  WatchedCertificates watch(nullptr);
  watch.ReloadNow();
  EXPECT_TRUE(watch.metrics()->Collect().empty());
}

}  // namespace
}  // namespace prefilld::process
