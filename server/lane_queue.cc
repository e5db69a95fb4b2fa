#include "server/lane_queue.h"

#include <utility>

namespace prefilld::server {
namespace {

// Each stream of a connection may have a message of this size under way, and the socket holds as
// much.
constexpr int64_t kBytesAheadPerStream = 8 << 20;

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
  {
    absl::MutexLock lock(&mu_);
    if (end_.has_value() && !end_->ok()) return;
    end_ = status;
    dropped.swap(queue_);
    pending_bytes_ = in_flight_bytes_;
    // This runs under the lock, so that End cannot come between and take the transport away.
    if (writing_) transport_->Cancel(status);
  }
  Pump();
}

void LaneQueue::OnWriteDone(bool ok) {
  std::deque<Message> dropped;
  {
    absl::MutexLock lock(&mu_);
    writing_ = false;
    taken_.busy += clock_.Now() - write_started_;
    if (ok) taken_.payload_bytes += in_flight_bytes_;
    pending_bytes_ -= in_flight_bytes_;
    in_flight_bytes_ = 0;
    if (!ok && (!end_.has_value() || end_->ok())) {
      end_ = absl::CancelledError("the stream broke");
      dropped.swap(queue_);
      pending_bytes_ = 0;
    }
  }
  Pump();
}

// The transport is called without the lock. `writing_` keeps all other threads from it until the
// write is done; after that a null transport_ does.
void LaneQueue::Pump() {
  Transport* transport = nullptr;
  Message message;
  bool last = false;
  std::optional<absl::Status> end;
  {
    absl::MutexLock lock(&mu_);
    if (transport_ == nullptr || writing_) return;
    if (!queue_.empty()) {
      writing_ = true;
      StartClock();
      message = std::move(queue_.front());
      queue_.pop_front();
      in_flight_bytes_ = PayloadBytes(message);
      if (auto* frame = std::get_if<KvFrame>(&message)) Stamp(*frame);
      last = queue_.empty() && end_.has_value();
      transport = transport_;
    } else if (end_.has_value()) {
      end = end_;
      transport = std::exchange(transport_, nullptr);
    } else {
      return;
    }
  }
  if (end.has_value()) {
    transport->End(*end);
  } else {
    transport->Send(std::move(message), last);
  }
}

void LaneQueue::Stamp(KvFrame& frame) {
  frame.header.lane = lane_;
  frame.header.sequence = next_sequence_++;
  frame.header.sent_at_us = absl::ToInt64Microseconds(clock_.Now() - progress_.started_at);
  frame.header.layers_computed = progress_.layers_computed.load(std::memory_order_relaxed);
}

size_t LaneQueue::pending_bytes() const {
  absl::MutexLock lock(&mu_);
  return pending_bytes_;
}

bool LaneQueue::idle() const {
  absl::MutexLock lock(&mu_);
  return queue_.empty() && !writing_;
}

absl::Duration LaneQueue::StalledFor(absl::Time now) {
  absl::MutexLock lock(&mu_);
  if (!writing_) return absl::ZeroDuration();
  NoteProgress(now);
  return now - last_progress_;
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
  last_progress_ = now;
}

LaneQueue::Taken LaneQueue::taken(absl::Time now) const {
  absl::MutexLock lock(&mu_);
  Taken taken = taken_;
  if (writing_) taken.busy += now - write_started_;
  return taken;
}

}  // namespace prefilld::server
