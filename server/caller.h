// Who makes a call, and in which trace, as far as its headers and its connection tell.
#ifndef PREFILLD_SERVER_CALLER_H_
#define PREFILLD_SERVER_CALLER_H_

#include <string>

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "proto/wire/trace_context.h"

namespace prefilld::server {

// For the log. Everything in it may come from a stranger.
struct Caller {
  std::string peer;         // its address
  std::string certificate;  // the name in its certificate; empty: it showed none
  std::string user_agent;   // its beginning
  std::string tenant;       // empty: callers are not told apart
  wire::TraceContext trace;
  absl::Time arrived_at = absl::Now();  // its call
};

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_CALLER_H_
