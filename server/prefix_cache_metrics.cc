#include "server/prefix_cache_metrics.h"

#include <string>

#include <prometheus/registry.h>

namespace prefilld::server {
namespace {

using Counts = model::PrefixCacheCounts;

struct Count {
  int64_t Counts::*value;
  const char* name;
  const char* help;
};
constexpr Count kCounts[] = {
    {&Counts::lookups, "prefilld_prefix_cache_lookups_total",
     "Prompts whose beginning was looked for in the prefix cache."},
    {&Counts::hits, "prefilld_prefix_cache_hits_total",
     "Prompts whose beginning was found, at least a block of it."},
    {&Counts::hit_tokens, "prefilld_prefix_cache_hit_tokens_total",
     "Prompt tokens that were loaded instead of computed."},
    {&Counts::stored_blocks, "prefilld_prefix_cache_stored_blocks_total",
     "Blocks of 128 tokens that were stored."},
    {&Counts::evicted_blocks, "prefilld_prefix_cache_evicted_blocks_total",
     "Blocks that made room for others."},
    {&Counts::skipped_blocks, "prefilld_prefix_cache_skipped_blocks_total",
     "Blocks that were not stored because prompts under way held all others."}};

prometheus::Counter& NewCounter(prometheus::Registry& registry, const std::string& name,
                                const std::string& help) {
  return prometheus::BuildCounter().Name(name).Help(help).Register(registry).Add({});
}

prometheus::Gauge& NewGauge(prometheus::Registry& registry, const std::string& name,
                            const std::string& help) {
  return prometheus::BuildGauge().Name(name).Help(help).Register(registry).Add({});
}

void RaiseTo(double value, prometheus::Counter& counter) {
  if (value > counter.Value()) counter.Increment(value - counter.Value());
}

}  // namespace

PrefixCacheMetrics::PrefixCacheMetrics(prometheus::Registry& registry)
    : load_seconds_(NewCounter(registry, "prefilld_prefix_cache_load_seconds_total",
                               "Time that copying cached KV to the device took, most of it beside "
                               "the computation.")),
      bytes_(NewGauge(registry, "prefilld_prefix_cache_bytes",
                      "Memory of the prefix cache that holds KV, or is being filled.")),
      capacity_bytes_(NewGauge(registry, "prefilld_prefix_cache_capacity_bytes",
                               "Memory of the prefix cache; 0: there is none.")) {
  for (const Count& count : kCounts) {
    counters_.emplace_back(count.value, &NewCounter(registry, count.name, count.help));
  }
}

void PrefixCacheMetrics::Set(const model::PrefixCacheUse& use) {
  for (const auto& [value, counter] : counters_) {
    RaiseTo(static_cast<double>(use.counts.*value), *counter);
  }
  RaiseTo(use.load_seconds, load_seconds_);
  bytes_.Set(static_cast<double>(use.counts.used_slots * use.block_bytes));
  capacity_bytes_.Set(static_cast<double>(use.counts.num_slots * use.block_bytes));
}

}  // namespace prefilld::server
