#include "server/lane_queue.h"

#include <algorithm>
#include <utility>

#include "proto/status_macros.h"

namespace prefilld::server {
namespace {

// Each stream of a connection may have a message of this size under way, and the socket holds as
// much.
constexpr int64_t kBytesAheadPerStream = 8 << 20;

using ::prefill::v1::PrefillEvent;

absl::Status Replaced() { return absl::AbortedError("another stream has taken this one's place"); }

bool HasAccepted(const Message& message) {
  const auto* event = std::get_if<PrefillEvent>(&message);
  return event != nullptr && event->has_accepted();
}

size_t PayloadBytes(const Message& message) {
  const auto* frame = std::get_if<KvFrame>(&message);
  return frame == nullptr ? 0 : frame->payload_bytes;
}

}  // namespace

bool LaneQueue::Attach(Transport* transport) {
  {
    absl::MutexLock lock(&mu_);
    if (was_attached_) return false;
    was_attached_ = true;
    transport_ = transport;
  }
  Pump();
  return true;
}

bool LaneQueue::attached() const {
  absl::MutexLock lock(&mu_);
  return was_attached_;
}

void LaneQueue::KeepUntilAcknowledged() {
  absl::MutexLock lock(&mu_);
  if (std::exchange(keeps_frames_, true)) return;
  retained_.StartAt(next_sequence_);
  acknowledged_ = taken_;
}

absl::StatusOr<int64_t> LaneQueue::Resume(Transport* transport, std::optional<uint64_t> received,
                                          std::optional<Message> greeting) {
  std::optional<Successor> overtaken;  // by this one, before it took its place
  std::deque<KvFrame> released;        // destroyed after the lock: buffers go back to their ring
  int64_t again = 0;
  {
    absl::MutexLock lock(&mu_);
    if (end_.has_value() && !end_->ok()) return *end_;
    if (received.has_value()) {
      PREFILLD_RETURN_IF_ERROR(retained_.CheckResumable(*received));
      released = GoOn(*received);
    }
    again = retained_.size();
    overtaken = std::exchange(successor_, Successor{transport, std::move(greeting)});
    was_attached_ = true;
    if (transport_ == nullptr) {
      SeatSuccessor();
    } else {
      lost_ = true;
      if (writing_) transport_->Cancel(Replaced());
    }
  }
  if (overtaken.has_value()) overtaken->transport->End(Replaced());
  Pump();
  return again;
}

absl::Status LaneQueue::CheckResumable(uint64_t received) const {
  absl::MutexLock lock(&mu_);
  if (end_.has_value() && !end_->ok()) return *end_;
  return retained_.CheckResumable(received);
}

absl::StatusOr<int64_t> LaneQueue::GoOnFrom(uint64_t received) {
  std::deque<KvFrame> released;  // destroyed after the lock
  absl::MutexLock lock(&mu_);
  if (end_.has_value() && !end_->ok()) return *end_;
  PREFILLD_RETURN_IF_ERROR(retained_.CheckResumable(received));
  released = GoOn(received);
  return retained_.size();
}

void LaneQueue::ForgoResumption() {
  absl::MutexLock lock(&mu_);
  resumable_ = keeps_frames_ = false;
  away_since_.reset();
}

// The new transport brings all that may have been lost with the one before: its greeting is for an
// Accepted that was not sent.
void LaneQueue::SeatSuccessor() {
  transport_ = successor_->transport;
  greeting_ = std::move(successor_->greeting);
  successor_.reset();
  if (!queue_.empty() && HasAccepted(queue_.front())) queue_.pop_front();
  if (result_.has_value()) queue_.push_back(*std::exchange(result_, std::nullopt));
  retained_.SendAllAgain();
}

// The consumer has a new stream, and these frames. The time away is neither a stall, but for a
// consumer who comes and goes and takes nothing, nor time in which it was busy with a frame.
std::deque<KvFrame> LaneQueue::GoOn(uint64_t received) {
  const bool was_excused = std::exchange(was_excused_, true);
  if (away_since_.has_value() && !was_excused) acknowledged_at_ += clock_.Now() - *away_since_;
  away_since_.reset();
  std::deque<KvFrame> released = retained_.Release(received);
  CountAcknowledged(released);
  return released;
}

bool LaneQueue::OnPeerGone(const Transport* transport) {
  std::optional<Successor> gone;
  {
    absl::MutexLock lock(&mu_);
    if (!resumable_ || !was_attached_) return false;
    if (successor_.has_value() && successor_->transport == transport) {
      gone = std::exchange(successor_, std::nullopt);
    } else if (transport_ == transport) {
      lost_ = true;
    }
  }
  if (gone.has_value()) gone->transport->End(absl::CancelledError("the stream broke"));
  Pump();
  return true;
}

absl::StatusOr<int64_t> LaneQueue::Acknowledge(uint64_t received,
                                               absl::Span<const uint64_t> damaged) {
  std::deque<KvFrame> released;  // destroyed after the lock
  int64_t again = 0;
  {
    absl::MutexLock lock(&mu_);
    PREFILLD_RETURN_IF_ERROR(retained_.CheckAcknowledged(received));
    released = retained_.Release(received);
    CountAcknowledged(released);
    for (const uint64_t sequence : damaged) {
      PREFILLD_ASSIGN_OR_RETURN(const bool sent, retained_.SendAgain(sequence));
      again += sent ? 1 : 0;
    }
  }
  Pump();
  return again;
}

void LaneQueue::CountAcknowledged(const std::deque<KvFrame>& released) {
  if (released.empty()) return;
  const absl::Time now = clock_.Now();
  for (const KvFrame& frame : released) acknowledged_.payload_bytes += frame.payload_bytes;
  acknowledged_.busy += now - acknowledged_at_;
  acknowledged_at_ = now;
  was_excused_ = false;
}

void LaneQueue::Push(Message message) {
  {
    absl::MutexLock lock(&mu_);
    if (end_.has_value()) return;
    pending_bytes_ += PayloadBytes(message);
    queue_.push_back(std::move(message));
  }
  Pump();
}

void LaneQueue::Close(std::optional<Message> last) {
  {
    absl::MutexLock lock(&mu_);
    if (end_.has_value()) return;
    if (last.has_value()) queue_.push_back(*std::move(last));
    end_ = absl::OkStatus();
  }
  Pump();
}

void LaneQueue::Abort(const absl::Status& status) {
  std::deque<Message> dropped;  // destroyed after the lock: buffers go back to their ring
  std::deque<KvFrame> released;
  {
    absl::MutexLock lock(&mu_);
    if (end_.has_value() && !end_->ok()) return;
    end_ = status;
    dropped.swap(queue_);
    released = retained_.TakeAll();
    greeting_.reset();
    result_.reset();
    away_since_.reset();
    pending_bytes_ = in_flight_bytes_;
    // This runs under the lock, so that End cannot come between and take the transport away.
    if (writing_) transport_->Cancel(status);
  }
  Pump();
}

void LaneQueue::OnWriteDone(bool ok) {
  std::deque<Message> dropped;
  std::deque<KvFrame> released;
  {
    absl::MutexLock lock(&mu_);
    writing_ = false;
    taken_.busy += clock_.Now() - write_started_;
    if (ok) taken_.payload_bytes += in_flight_bytes_;
    pending_bytes_ -= in_flight_bytes_;
    in_flight_bytes_ = 0;
    if (!ok && resumable_) {
      lost_ = true;
    } else if (!ok && (!end_.has_value() || end_->ok())) {
      end_ = absl::CancelledError("the stream broke");
      dropped.swap(queue_);
      released = retained_.TakeAll();
      pending_bytes_ = 0;
    }
  }
  Pump();
}

// The transport is called without the lock. `writing_` keeps all other threads from it until the
// write is done; after that a null transport_ does.
void LaneQueue::Pump() {
  while (true) {
    std::optional<Next> next;
    {
      absl::MutexLock lock(&mu_);
      next = TakeNext();
    }
    if (!next.has_value()) return;
    if (next->message.has_value()) {
      next->transport->Send(*std::move(next->message), next->last);
      return;  // its OnWriteDone goes on
    }
    next->transport->End(next->end);
  }
}

std::optional<LaneQueue::Next> LaneQueue::TakeNext() {
  if (transport_ == nullptr || writing_) return std::nullopt;
  if (lost_) {
    absl::Status end = Replaced();
    if (!successor_.has_value()) end = absl::CancelledError("the stream broke");
    if (end_.has_value() && !end_->ok()) end = *end_;
    return Next{.transport = Detach(), .end = std::move(end)};
  }
  if (std::optional<Message> message = TakeMessage()) {
    writing_ = true;
    StartClock();
    in_flight_bytes_ = PayloadBytes(*message);
    const bool last = end_.has_value() && queue_.empty() && retained_.empty();
    return Next{.transport = transport_, .message = std::move(message), .last = last};
  }
  if (!end_.has_value() || (end_->ok() && !retained_.empty())) return std::nullopt;
  return Next{.transport = Detach(), .end = *end_};
}

// Frames that are sent once more hold up the acknowledgement of all others, so they go first.
std::optional<Message> LaneQueue::TakeMessage() {
  if (greeting_.has_value()) return std::exchange(greeting_, std::nullopt);
  if (std::optional<KvFrame> frame = retained_.NextAgain()) {
    pending_bytes_ += frame->payload_bytes;
    return *std::move(frame);
  }
  if (queue_.empty()) return std::nullopt;
  Message message = std::move(queue_.front());
  queue_.pop_front();
  if (auto* frame = std::get_if<KvFrame>(&message)) {
    Stamp(*frame);
    if (keeps_frames_) {
      if (retained_.empty()) {
        acknowledged_at_ = clock_.Now();
        was_excused_ = false;
      }
      retained_.Add(*frame);
    }
  } else if (resumable_ && std::get<PrefillEvent>(message).has_result()) {
    result_ = std::get<PrefillEvent>(message);
  }
  return message;
}

// Takes the transport away, to be ended. A consumer to whom nothing is left to be said is not
// missed, nor one that was aborted, but one whose result was sent may have to come back for it.
Transport* LaneQueue::Detach() {
  Transport* const transport = std::exchange(transport_, nullptr);
  if (!resumable_) return transport;
  const bool is_aborted = end_.has_value() && !end_->ok();
  const bool all_is_said = is_aborted || (!lost_ && !result_.has_value());
  lost_ = false;
  greeting_.reset();
  if (successor_.has_value()) {
    SeatSuccessor();
  } else if (!all_is_said && !away_since_.has_value()) {
    away_since_ = clock_.Now();
  }
  return transport;
}

void LaneQueue::Stamp(KvFrame& frame) {
  frame.header.lane = lane_;
  frame.header.sequence = next_sequence_++;
  frame.header.sent_at_us = absl::ToInt64Microseconds(clock_.Now() - progress_.started_at);
  frame.header.layers_computed = progress_.layers_computed.load(std::memory_order_relaxed);
}

size_t LaneQueue::pending_bytes() const {
  absl::MutexLock lock(&mu_);
  return pending_bytes_ + static_cast<size_t>(retained_.bytes());
}

bool LaneQueue::idle() const {
  absl::MutexLock lock(&mu_);
  return queue_.empty() && !retained_.has_again() && !writing_;
}

LaneQueue::HeldFrames LaneQueue::held_frames() const {
  absl::MutexLock lock(&mu_);
  HeldFrames held = {.all = retained_.size(), .staged = retained_.staged()};
  for (const Message& message : queue_) {
    const auto* frame = std::get_if<KvFrame>(&message);
    if (frame == nullptr) continue;
    ++held.all;
    if (IsStaged(*frame)) ++held.staged;
  }
  return held;
}

bool LaneQueue::all_acknowledged() const {
  absl::MutexLock lock(&mu_);
  return pending_bytes_ == in_flight_bytes_ && retained_.empty();
}

bool LaneQueue::has_transport() const {
  absl::MutexLock lock(&mu_);
  return transport_ != nullptr;
}

absl::Duration LaneQueue::AwayFor(absl::Time now) const {
  absl::MutexLock lock(&mu_);
  return away_since_.has_value() ? now - *away_since_ : absl::ZeroDuration();
}

absl::Duration LaneQueue::StalledFor(absl::Time now) {
  absl::MutexLock lock(&mu_);
  if (writing_) {
    NoteProgress(now);
    const bool has_to_acknowledge = was_excused_ && !retained_.empty();
    return now - (has_to_acknowledge ? std::min(last_progress_, acknowledged_at_) : last_progress_);
  }
  if (transport_ == nullptr || retained_.empty()) return absl::ZeroDuration();
  NoteProgress(now);  // of what a slow connection has still to bring
  return now - std::max(acknowledged_at_, passed_on_at_);
}

void LaneQueue::StartClock() {
  write_started_ = last_progress_ = clock_.Now();
  taken_at_start_ = taken_at_progress_ =
      transport_->connection_use().value_or(Transport::ConnectionUse()).bytes_taken;
}

void LaneQueue::NoteProgress(absl::Time now) {
  const std::optional<Transport::ConnectionUse> use = transport_->connection_use();
  if (!use.has_value() || use->bytes_taken - taken_at_progress_ < kProgressBytes) return;
  const int64_t ahead =
      static_cast<int64_t>(in_flight_bytes_) + use->most_streams * kBytesAheadPerStream;
  if (use->bytes_taken - taken_at_start_ > ahead) return;
  taken_at_progress_ = use->bytes_taken;
  last_progress_ = passed_on_at_ = now;
}

LaneQueue::Taken LaneQueue::taken(absl::Time now) const {
  absl::MutexLock lock(&mu_);
  if (keeps_frames_) {
    Taken taken = acknowledged_;
    // Until the peer has said where to go on, a new stream ends no time away.
    const bool is_here = transport_ != nullptr && !away_since_.has_value();
    if (is_here && !retained_.empty()) taken.busy += now - acknowledged_at_;
    return taken;
  }
  Taken taken = taken_;
  if (writing_) taken.busy += now - write_started_;
  return taken;
}

}  // namespace prefilld::server
