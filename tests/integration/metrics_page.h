#ifndef PREFILLD_TESTS_INTEGRATION_METRICS_PAGE_H_
#define PREFILLD_TESTS_INTEGRATION_METRICS_PAGE_H_

#include <functional>
#include <string>

#include "absl/time/time.h"

namespace prefilld::integration {

// One scrape of a Prometheus endpoint ("host:port") over plain HTTP, or another page of it.
class MetricsPage {
 public:
  explicit MetricsPage(const std::string& address, const std::string& path = "/metrics");

  // Returns the value of the sample written exactly so, with its labels. Aborts when there is none.
  double Value(const std::string& sample) const;
  const std::string& text() const { return text_; }

 private:
  std::string text_;
};

// Scrapes until `condition` holds. Returns false after `timeout`.
bool WaitForMetrics(const std::string& address, absl::Duration timeout,
                    const std::function<bool(const MetricsPage&)>& condition);

}  // namespace prefilld::integration

#endif  // PREFILLD_TESTS_INTEGRATION_METRICS_PAGE_H_
