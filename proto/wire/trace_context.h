// W3C Trace Context (https://www.w3.org/TR/trace-context/), which joins the parts of one exchange
// over several processes: metadata `traceparent` and `tracestate`.
#ifndef PREFILLD_PROTO_WIRE_TRACE_CONTEXT_H_
#define PREFILLD_PROTO_WIRE_TRACE_CONTEXT_H_

#include <string>
#include <utility>
#include <vector>

#include "absl/strings/string_view.h"

namespace grpc {
class ServerContextBase;
}  // namespace grpc

namespace prefilld::wire {

// The span of one call or of one part of it, and where it stands. Ids are lower-case hexadecimal
// digits and never all zero.
struct TraceContext {
  std::string trace_id;        // 32 digits, the same for the whole exchange
  std::string span_id;         // 16 digits
  std::string parent_span_id;  // empty: the trace begins with this span
  std::string flags = "00";    // as the caller set them; 01: it records the trace
  std::string state;           // tracestate, passed on as it came; empty: none

  // Tells whether the caller says that it records the trace.
  bool is_recorded() const;
  // Makes a span below this one.
  TraceContext Child() const;
  // Returns "00-<trace_id>-<span_id>-<flags>", which tells others that this is their parent.
  std::string traceparent() const;
  // Returns what a call made within this span carries: traceparent and, if there is one,
  // tracestate.
  std::vector<std::pair<std::string, std::string>> Metadata() const;
};

// A trace that was taken from a caller.
struct TakenTrace {
  TraceContext context;
  // The caller sent something under these keys that is not valid, and was not used.
  bool ignored = false;
};

// Makes a span below that of the caller. Each list has the values that came under its key. Whoever
// sends no traceparent, several, or one that is not valid, starts a new trace. A tracestate that is
// not valid, or is longer than 512 characters, is dropped; so is one without a valid traceparent.
TakenTrace TakeTrace(const std::vector<absl::string_view>& traceparents,
                     const std::vector<absl::string_view>& tracestates);
TakenTrace TakeTrace(const grpc::ServerContextBase& call);

// The metadata key under which an answer names the span that its request had, as a traceparent.
inline constexpr char kTraceResponseKey[] = "traceresponse";

}  // namespace prefilld::wire

#endif  // PREFILLD_PROTO_WIRE_TRACE_CONTEXT_H_
