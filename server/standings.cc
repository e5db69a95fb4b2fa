#include "server/standings.h"

#include <algorithm>

#include "model/prefill/prefill_engine.h"
#include "server/prefill_job.h"
#include "server/prefill_pass.h"

namespace prefilld::server {

Standings::Standings(const model::EngineInfo& engine, absl::Span<const Tenant> tenants,
                     TenantMetrics& metrics, Scheduling scheduling)
    : engine_(engine), scheduling_(scheduling), shares_(tenants, metrics) {}

Contender Standings::OfPass(const PrefillPass& pass, absl::Time last_step_at,
                            absl::Time now) const {
  // A pass without jobs only gives its place back, and that goes first.
  if (pass.AllEnded()) {
    return {.class_waited = absl::InfiniteDuration(), .age = absl::InfiniteDuration()};
  }
  Contender contender = shares_.StandingOf(pass.jobs(), now);
  contender.remaining = pass.Remaining(
      costs_.Layer(pass.jobs().front()->work().attention.policy, pass.num_computed_tokens()));
  for (const auto& job : pass.jobs()) {
    contender.age = std::max(contender.age, now - job->accepted_at());
  }
  // That it was started is no step, or else it would wait for the first one all over again.
  contender.waited = pass.layers_computed() == 0 ? contender.age : now - last_step_at;
  return contender;
}

Contender Standings::OfWaiting(const std::shared_ptr<PrefillJob>& job, absl::Time now) const {
  // Counts the tokens that will be computed, unless the prefix cache changes meanwhile.
  const auto num_new_tokens =
      static_cast<int64_t>(job->work().tokens.size()) - job->expected_cached_tokens();
  const absl::Duration layer = costs_.Layer(job->work().attention.policy, num_new_tokens);
  Contender contender = shares_.StandingOf(absl::MakeConstSpan(&job, 1), now);
  // Until log-probabilities have been measured, they are taken to last as long as a layer.
  const int layers = engine_.config.num_layers + (job->work().prompt_logprobs ? 1 : 0);
  contender.remaining = layers * layer;
  contender.waited = now - job->accepted_at();
  contender.age = contender.waited;
  return contender;
}

}  // namespace prefilld::server
