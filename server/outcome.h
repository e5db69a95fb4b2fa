// How requests end; the `outcome` label of the metrics and of the log.
#ifndef PREFILLD_SERVER_OUTCOME_H_
#define PREFILLD_SERVER_OUTCOME_H_

#include <array>
#include <cstdint>

namespace prefilld::server {

enum class Outcome : uint8_t {
  kOk,
  kInvalid,          // refused: a field, a model that is not here, what its tenant may not have
  kDuplicate,        // refused: its id is taken by a running request
  kQueueFull,        // refused: requests or tokens, of the queue or of the tenant
  kUnauthenticated,  // refused: its caller is no tenant
  kUnavailable,      // refused: draining, or the device has failed
  kDeadline,         // its deadline passed
  kCancelled,        // cancelled by the caller, or its connection died
  kStalled,          // the consumer took nothing
  kTooSlow,          // the consumer took little while others waited
  kDamaged,          // copies of one frame arrived damaged again and again
  kNotResumed,       // its connection broke, and nobody came back in time or more waited than may
  kLanesMissing,     // lanes were announced and not attached
  kReceiverFailed,   // the target of a push refused, failed or went away
  kDeviceFailed,     // in flight when the device failed
  kShutDown,         // in flight when the drain time ran out
  kInternal,         // the model gave no usable logits
};

inline constexpr std::array<Outcome, 17> kOutcomes = {
    Outcome::kOk,           Outcome::kInvalid,         Outcome::kDuplicate,
    Outcome::kQueueFull,    Outcome::kUnauthenticated, Outcome::kUnavailable,
    Outcome::kDeadline,     Outcome::kCancelled,       Outcome::kStalled,
    Outcome::kTooSlow,      Outcome::kDamaged,         Outcome::kNotResumed,
    Outcome::kLanesMissing, Outcome::kReceiverFailed,  Outcome::kDeviceFailed,
    Outcome::kShutDown,     Outcome::kInternal};

constexpr const char* Name(Outcome outcome) {
  switch (outcome) {
    case Outcome::kOk:
      return "ok";
    case Outcome::kInvalid:
      return "invalid";
    case Outcome::kDuplicate:
      return "duplicate";
    case Outcome::kQueueFull:
      return "queue_full";
    case Outcome::kUnauthenticated:
      return "unauthenticated";
    case Outcome::kUnavailable:
      return "unavailable";
    case Outcome::kDeadline:
      return "deadline";
    case Outcome::kCancelled:
      return "cancelled";
    case Outcome::kStalled:
      return "stalled";
    case Outcome::kTooSlow:
      return "too_slow";
    case Outcome::kDamaged:
      return "damaged";
    case Outcome::kNotResumed:
      return "not_resumed";
    case Outcome::kLanesMissing:
      return "lanes_missing";
    case Outcome::kReceiverFailed:
      return "receiver_failed";
    case Outcome::kDeviceFailed:
      return "device_failed";
    case Outcome::kShutDown:
      return "shut_down";
    case Outcome::kInternal:
      return "internal";
  }
  return "?";
}

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_OUTCOME_H_
