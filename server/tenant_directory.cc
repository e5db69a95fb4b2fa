#include "server/tenant_directory.h"

#include <algorithm>
#include <utility>

#include <prometheus/counter.h>
#include <prometheus/gauge.h>
#include <prometheus/registry.h>

#include "absl/status/statusor.h"
#include "proto/process/log.h"
#include "proto/status_macros.h"
#include "proto/wire/tls.h"

namespace prefilld::server {
namespace {

using process::LogEvent;
using process::LogLevel;

int64_t NumPresent(const Tenants& table) {
  return std::count_if(table.all().begin(), table.all().end(),
                       [](const Tenant& tenant) { return !tenant.is_gone; });
}

prometheus::Family<prometheus::Counter>& Reloads(prometheus::Registry& registry) {
  return prometheus::BuildCounter()
      .Name("prefilld_tenants_reloads_total")
      .Help("Times that the file of tenants was read again, by whether it was valid.")
      .Register(registry);
}

}  // namespace

TenantDirectory::TenantDirectory(std::string path, Strangers strangers, Tenants table, Check check,
                                 Apply apply, OnChange on_change, prometheus::Registry& registry)
    : path_(std::move(path)),
      strangers_(strangers),
      check_(std::move(check)),
      apply_(std::move(apply)),
      on_change_(std::move(on_change)),
      num_tenants_(prometheus::BuildGauge()
                       .Name("prefilld_tenants")
                       .Help("Tenants that the operator's file has now.")
                       .Register(registry)
                       .Add({})),
      reloaded_(Reloads(registry).Add({{"result", "ok"}})),
      refused_(Reloads(registry).Add({{"result", "refused"}})),
      is_refused_(prometheus::BuildGauge()
                      .Name("prefilld_tenants_refused")
                      .Help("1 while the file of tenants is not valid and an older one holds.")
                      .Register(registry)
                      .Add({})),
      table_(std::make_shared<const Tenants>(std::move(table))) {
  num_tenants_.Set(static_cast<double>(NumPresent(*current())));
}

void TenantDirectory::Reload() {
  if (const absl::Status read = ReadFile(); !read.ok()) {
    refused_.Increment();
    is_refused_.Set(1);
    return LogEvent(LogLevel::kError, "tenants_refused",
                    {{"file", path_}, {"status", std::string(read.message())}});
  }
  on_change_();
  const int64_t present = NumPresent(*current());
  reloaded_.Increment();
  is_refused_.Set(0);
  num_tenants_.Set(static_cast<double>(present));
  LogEvent(LogLevel::kInfo, "tenants_reloaded", {{"file", path_}, {"tenants", present}});
}

absl::Status TenantDirectory::ReadFile() {
  PREFILLD_ASSIGN_OR_RETURN(const Tenants read, Tenants::Read(path_, strangers_));
  PREFILLD_RETURN_IF_ERROR(check_(read));
  PREFILLD_ASSIGN_OR_RETURN(Tenants moved, read.InPositionsOf(*current()));
  auto table = std::make_shared<const Tenants>(std::move(moved));
  apply_(*table);
  absl::MutexLock lock(&mu_);
  table_ = std::move(table);
  return absl::OkStatus();
}

std::vector<process::FileWatch::Subject> TenantDirectory::Subjects() {
  if (path_.empty()) return {};
  return {{.versions = [this] { return wire::FileVersions({path_}); },
           .read = current()->file_version(),
           .reload = [this](bool) { Reload(); }}};
}

}  // namespace prefilld::server
