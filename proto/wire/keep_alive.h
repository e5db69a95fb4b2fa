// The settings by which both ends of a connection notice that the other one is gone, and by which
// callers notice that it is back.
#ifndef PREFILLD_PROTO_WIRE_KEEP_ALIVE_H_
#define PREFILLD_PROTO_WIRE_KEEP_ALIVE_H_

#include <array>
#include <utility>

#include <grpc/grpc.h>

namespace prefilld::wire {

// A server that vanished without a word is noticed by its clients within half a minute: after 20 s
// in which nothing came it is pinged, and it has 10 s to answer. Servers notice a machine that
// vanished as early, by TCP (Connections::Limits), and are more patient with one that is there: a
// process that is stopped, or reads nothing, loses its calls one by one (Listener).
inline constexpr int kKeepAliveTimeMs = 20'000;
inline constexpr int kKeepAliveTimeoutMs = 10'000;

// The arguments of a client of prefilld or of the decode worker. The number of pings is not
// limited, because a long prefill sends nothing.
inline constexpr std::array<std::pair<const char*, int>, 3> kKeepAliveArguments = {
    {{GRPC_ARG_KEEPALIVE_TIME_MS, kKeepAliveTimeMs},
     {GRPC_ARG_KEEPALIVE_TIMEOUT_MS, kKeepAliveTimeoutMs},
     {GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0}}};

// A peer that was away for however long is called again within about 2 s of its return: the pause
// between two attempts grows to that and no further. gRPC's own limits are 2 minutes for the pause,
// 20 s for an attempt that nobody answers, and 30 s between two look-ups of a name. In spite of its
// name, the first of these arguments bounds the time of such an attempt.
inline constexpr std::array<std::pair<const char*, int>, 4> kReconnectArguments = {
    {{GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, 5'000},
     {GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 200},
     {GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 2'000},
     {GRPC_ARG_DNS_MIN_TIME_BETWEEN_RESOLUTIONS_MS, 2'000}}};

// Servers accept a ping every 10 s, with some allowance for jitter.
inline constexpr int kMinPingIntervalMs = 5'000;

}  // namespace prefilld::wire

#endif  // PREFILLD_PROTO_WIRE_KEEP_ALIVE_H_
