#include "server/turns.h"

#include <algorithm>
#include <numeric>

namespace prefilld::server {
namespace {

constexpr double kAgeing = 0.5;

absl::Duration Rank(const Contender& contender) {
  return contender.remaining - kAgeing * contender.waited;
}

}  // namespace

std::vector<size_t> OrderOfTurns(absl::Span<const Contender> contenders) {
  std::vector<size_t> order(contenders.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    return Rank(contenders[a]) < Rank(contenders[b]);
  });
  return order;
}

}  // namespace prefilld::server
