#include "server/standings.h"

#include <algorithm>

#include "model/prefill/prefill_engine.h"
#include "server/prefill_job.h"
#include "server/prefill_pass.h"

namespace prefilld::server {

Standings::Standings(const model::EngineInfo& engine, absl::Span<const Tenant> tenants,
                     TenantMetrics& metrics, Scheduling scheduling)
    : engine_(engine), scheduling_(scheduling), shares_(tenants, metrics) {}

// Layers behind a cached prefix take longer per token than their number says, and first layers
// longer than others, but one of them says more than nothing.
void Standings::RecordLayer(const PrefillPass& pass, absl::Duration layer) {
  if (pass.num_computed_tokens() < pass.num_tokens()) return;
  const auto policy = pass.jobs().front()->work().attention.policy;
  if (pass.layers_computed() > 1 || !costs_.Knows(policy)) {
    costs_.Record(policy, pass.num_tokens(), layer);
  }
}

Contender Standings::OfPass(const PrefillPass& pass, absl::Time last_step_at,
                            absl::Time now) const {
  // A pass that only delivers what it has, or only gives its place back, goes first.
  if (!pass.uses_device()) {
    return {.class_waited = absl::InfiniteDuration(), .age = absl::InfiniteDuration()};
  }
  Contender contender = shares_.StandingOf(pass.jobs(), now);
  const int64_t num_cached = pass.num_tokens() - pass.num_computed_tokens();
  contender.remaining = pass.Remaining(costs_.LayerBehind(
      pass.jobs().front()->work().attention.policy, num_cached, pass.num_computed_tokens()));
  for (const auto& job : pass.jobs()) {
    contender.age = std::max(contender.age, now - job->accepted_at());
  }
  // That it was started is no step, or else it would wait for the first one all over again.
  contender.waited = pass.layers_computed() == 0 ? contender.age : now - last_step_at;
  return contender;
}

Contender Standings::OfWaiting(const std::shared_ptr<PrefillJob>& job, absl::Time now) const {
  // Counts the tokens that will be computed, unless the prefix cache changes meanwhile.
  const int64_t num_cached = job->expected_cached_tokens();
  const absl::Duration layer =
      costs_.LayerBehind(job->work().attention.policy, num_cached,
                         static_cast<int64_t>(job->work().tokens.size()) - num_cached);
  Contender contender = shares_.StandingOf(absl::MakeConstSpan(&job, 1), now);
  // Until log-probabilities have been measured, they are taken to last as long as a layer.
  const int layers =
      WholeLayers(engine_.config.num_layers, job->work()) + (job->work().prompt_logprobs ? 1 : 0);
  contender.remaining = layers * layer;
  contender.waited = now - job->accepted_at();
  contender.age = contender.waited;
  return contender;
}

}  // namespace prefilld::server
