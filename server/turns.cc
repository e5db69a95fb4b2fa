#include "server/turns.h"

#include <algorithm>
#include <numeric>

namespace prefilld::server {
namespace {

bool IsOverdue(const Contender& contender) {
  return contender.class_waited >
         std::max(kClassPatience, kClassPatienceSteps * contender.class_step);
}

absl::Duration Rank(const Contender& contender) {
  return contender.remaining - kAgeing * contender.waited;
}

bool GoesFirst(const Contender& a, const Contender& b) {
  const bool is_overdue = IsOverdue(a);
  if (is_overdue != IsOverdue(b)) return is_overdue;
  if (is_overdue && a.class_waited != b.class_waited) return a.class_waited > b.class_waited;
  if (a.priority != b.priority) return a.priority > b.priority;
  if (a.tenant_time != b.tenant_time) return a.tenant_time < b.tenant_time;
  return Rank(a) < Rank(b);
}

bool IsOlder(const Contender& a, const Contender& b) { return a.age > b.age; }

std::vector<size_t> Sorted(absl::Span<const Contender> contenders,
                           bool (*goes_first)(const Contender&, const Contender&)) {
  std::vector<size_t> order(contenders.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return goes_first(contenders[a], contenders[b]); });
  return order;
}

}  // namespace

const char* Name(Scheduling scheduling) {
  return scheduling == Scheduling::kFifo ? "fifo" : "turns";
}

std::vector<size_t> OrderOfTurns(absl::Span<const Contender> contenders) {
  return Sorted(contenders, GoesFirst);
}

bool GoesBefore(Scheduling scheduling, const Contender& a, const Contender& b) {
  return scheduling == Scheduling::kFifo ? IsOlder(a, b) : GoesFirst(a, b);
}

std::vector<size_t> OrderOf(Scheduling scheduling, absl::Span<const Contender> contenders) {
  return Sorted(contenders, scheduling == Scheduling::kFifo ? IsOlder : GoesFirst);
}

}  // namespace prefilld::server
