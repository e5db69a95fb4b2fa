// The tenants as the operator's file has them now.
#ifndef PREFILLD_SERVER_TENANT_DIRECTORY_H_
#define PREFILLD_SERVER_TENANT_DIRECTORY_H_

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "proto/process/file_watch.h"
#include "server/tenants.h"

namespace prometheus {
class Counter;
class Gauge;
class Registry;
}  // namespace prometheus

namespace prefilld::server {

// Reads the file again when a FileWatch says so. A file that is not valid changes nothing but a
// counter and the log. Logs tenants_reloaded and tenants_refused. Thread-safe.
class TenantDirectory {
 public:
  // Tells whether a table fits the rest of the configuration.
  using Check = std::function<absl::Status(const Tenants&)>;
  // Takes the new tenants over. It is called before anybody can be one of them.
  using Apply = std::function<void(const Tenants&)>;
  // Called once a new table holds, for calls that are under way.
  using OnChange = std::function<void()>;

  // `path` is the file that `table` was read from; empty: there is none. `strangers` is what
  // becomes of those where the file does not say. Adds prefilld_tenants,
  // prefilld_tenants_reloads_total{result} and prefilld_tenants_refused to the registry.
  TenantDirectory(std::string path, Strangers strangers, Tenants table, Check check, Apply apply,
                  OnChange on_change, prometheus::Registry& registry);

  // Returns the table that holds now. A call uses one table from its beginning to its end.
  std::shared_ptr<const Tenants> current() const {
    absl::MutexLock lock(&mu_);
    return table_;
  }

  // Reads the file and, if it is valid, has it hold from now on. Requests that are under way keep
  // the tenant that they have. Must not be called by two threads at once.
  void Reload();

  // Returns what a FileWatch has to watch, which must not outlive this; nothing without a file.
  std::vector<process::FileWatch::Subject> Subjects();

 private:
  absl::Status ReadFile();

  const std::string path_;
  const Strangers strangers_;
  const Check check_;
  const Apply apply_;
  const OnChange on_change_;
  prometheus::Gauge& num_tenants_;
  prometheus::Counter& reloaded_;
  prometheus::Counter& refused_;
  prometheus::Gauge& is_refused_;  // the file as it is now

  mutable absl::Mutex mu_;
  std::shared_ptr<const Tenants> table_ ABSL_GUARDED_BY(mu_);
};

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_TENANT_DIRECTORY_H_
