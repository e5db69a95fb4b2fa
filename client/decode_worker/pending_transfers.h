#ifndef PREFILLD_CLIENT_DECODE_WORKER_PENDING_TRANSFERS_H_
#define PREFILLD_CLIENT_DECODE_WORKER_PENDING_TRANSFERS_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "client/cancellation.h"
#include "client/decode_worker/cache_writer.h"
#include "client/transfer_check.h"
#include "prefill/v1/prefill.pb.h"
#include "prefill/v1/receiver.pb.h"

namespace prefilld::client {

// A cache that is expected to be pushed here, shared by the Generate that waits for it and the
// calls that bring it. All own it, and any may go first. Thread-safe: frames of several lanes are
// verified and stored in parallel.
//
// It comes on one stream of Receive, whose end is its own, or on lanes of ReceiveLane. There a
// stream that breaks may be followed by another within the window.
class PendingTransfer {
 public:
  // `writer` is borrowed until Abandon or Await has returned.
  PendingTransfer(ExpectedTransfer expected, CacheWriter* writer,
                  absl::Duration resume_window = absl::ZeroDuration());

  // The receiving side calls the following. A stream is known by the Cancellation by which it is
  // told that another one has taken its place; null: it is that of Receive.
  using Stream = std::shared_ptr<Cancellation>;

  // Opens the transfer, or one more stream of it. Errors:
  // - FAILED_PRECONDITION: the layout is not the expected one, and the transfer has failed.
  // - INVALID_ARGUMENT: lane or num_lanes is out of range, or not as before.
  absl::Status Open(const ::prefill::v1::ReceiveOpen& open, const Stream& stream);
  // Takes a frame. An error ends the stream; ABORTED: another one has taken its place.
  absl::StatusOr<TransferCheck::Arrival> Write(uint32_t lane, const wire::ReceivedFrame& frame,
                                               const Stream& stream);
  // Returns the number of the lane's first frame that is not here undamaged.
  uint64_t received(uint32_t lane) const;
  // Ends the transfer well, with the sender's result. DATA_LOSS, and the transfer has failed, when
  // a frame is missing.
  absl::Status Complete(::prefill::v1::PrefillResult result, const Stream& stream);
  bool is_complete() const;
  // The stream of a lane is over, and its sender may come back within the window.
  void Close(uint32_t lane, const Stream& stream);
  // Fails the transfer, because the sender went away or broke the protocol.
  void Fail(absl::Status reason);
  uint64_t frames() const;
  uint64_t bytes() const;

  // The waiting side calls this. It blocks until the transfer is complete or has failed, until
  // nothing has come for `timeout` (DEADLINE_EXCEEDED), or a sender has been away for longer than
  // the window (UNAVAILABLE). It calls `while_waiting` every second or so, and an error that this
  // returns ends the transfer.
  absl::StatusOr<::prefill::v1::PrefillResult> Await(
      absl::Duration timeout, absl::FunctionRef<absl::Status()> while_waiting);
  // Ends the transfer, because nobody wants the cache any more. On return the writer is no longer
  // used.
  void Abandon(absl::Status reason);

  // Cancelled when the waiting side gives up, so that a silent stream can be ended.
  Cancellation& abandoned() { return abandoned_; }

 private:
  struct Lane {
    Stream stream;
    std::optional<absl::Time> away_since;
  };

  // Returns whether the transfer had not ended before.
  bool EndWith(absl::Status reason);
  absl::Status OpenFirst(const ::prefill::v1::ReceiveOpen& open, bool resumable)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Status CheckStream(uint32_t lane, const Stream& stream) const
      ABSL_SHARED_LOCKS_REQUIRED(mu_);
  absl::Status CheckSender(absl::Time now, absl::Duration timeout) const
      ABSL_SHARED_LOCKS_REQUIRED(mu_);
  void NoteSignOfLife() { last_sign_of_life_us_ = absl::ToUnixMicros(absl::Now()); }

  const ExpectedTransfer expected_;
  CacheWriter* const writer_;
  const absl::Duration resume_window_;
  Cancellation abandoned_;
  std::atomic<int64_t> last_sign_of_life_us_ = absl::ToUnixMicros(absl::Now());

  // Held for reading while a frame is stored, so that Abandon knows when the writer is at rest.
  mutable absl::Mutex mu_;
  ::prefill::v1::KvLayout layout_ ABSL_GUARDED_BY(mu_);
  std::vector<Lane> lanes_ ABSL_GUARDED_BY(mu_);               // once opened
  std::unique_ptr<TransferCheck> check_ ABSL_GUARDED_BY(mu_);  // once opened
  std::optional<::prefill::v1::PrefillResult> result_ ABSL_GUARDED_BY(mu_);
  absl::Status status_ ABSL_GUARDED_BY(mu_);
};

// The transfers that are waited for, by id. Thread-safe.
class PendingTransfers {
 public:
  // Expects a transfer until Unregister. ALREADY_EXISTS: the id is in use.
  absl::Status Register(const std::string& id, std::shared_ptr<PendingTransfer> transfer);
  // A transfer that is complete is remembered for a sender whose connection broke under the receipt
  // that says so: for `resume_window` after the moment at which the sender knows that its
  // connection is dead, at the latest (keep_alive.h). With a window of zero nobody comes back, and
  // nothing is remembered. At most kMaxRemembered are.
  void Unregister(const std::string& id, absl::Duration resume_window = absl::ZeroDuration());
  static constexpr size_t kMaxRemembered = 64;

  // Gives the transfer to the streams that deliver it. With an empty key it can be claimed once,
  // otherwise by all that show the key of the first. Errors:
  // - NOT_FOUND: nobody waits for it, or it comes on another stream.
  // - PERMISSION_DENIED: the key is another one.
  absl::StatusOr<std::shared_ptr<PendingTransfer>> Claim(const std::string& id,
                                                         const std::string& key = "");

 private:
  struct Entry {
    std::shared_ptr<PendingTransfer> transfer;
    std::optional<std::string> key = std::nullopt;  // once claimed
  };
  struct Remembered {
    std::string id;
    Entry entry;
    absl::Time until;
  };

  absl::Mutex mu_;
  absl::flat_hash_map<std::string, Entry> entries_ ABSL_GUARDED_BY(mu_);
  std::deque<Remembered> complete_ ABSL_GUARDED_BY(mu_);
};

}  // namespace prefilld::client

#endif  // PREFILLD_CLIENT_DECODE_WORKER_PENDING_TRANSFERS_H_
