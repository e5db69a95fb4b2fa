#ifndef PREFILLD_CLIENT_DECODE_WORKER_PENDING_TRANSFERS_H_
#define PREFILLD_CLIENT_DECODE_WORKER_PENDING_TRANSFERS_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

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

namespace prefilld::client {

// A cache that is expected to be pushed here, shared by the Generate that waits for it and the
// Receive that brings it. Both own it, and either may go first. Thread-safe.
class PendingTransfer {
 public:
  // `writer` is borrowed until Abandon or Await has returned.
  PendingTransfer(ExpectedTransfer expected, CacheWriter* writer);

  // The receiving side calls these. After an error it must make no other call: the transfer has
  // failed with that error. Open: FAILED_PRECONDITION when the layout is not the expected one.
  absl::Status Open(const ::prefill::v1::KvLayout& layout);
  absl::Status Write(const wire::ReceivedFrame& frame);
  // Ends the transfer well, with the sender's result, once the sender has closed the stream.
  // DATA_LOSS when a frame is missing.
  absl::Status Complete(::prefill::v1::PrefillResult result);
  // Fails the transfer, because the sender went away or broke the protocol.
  void Fail(absl::Status reason);
  uint64_t frames() const;
  uint64_t bytes() const;

  // The waiting side calls this. It blocks until the transfer is complete or has failed, or until
  // nothing has come for `timeout` (DEADLINE_EXCEEDED). It calls `while_waiting` every second or
  // so, and an error that this returns ends the transfer.
  absl::StatusOr<::prefill::v1::PrefillResult> Await(
      absl::Duration timeout, absl::FunctionRef<absl::Status()> while_waiting);
  // Ends the transfer, because nobody wants the cache any more. On return the writer is no longer
  // used.
  void Abandon(absl::Status reason);

  // Cancelled when the waiting side gives up, so that a silent stream can be ended.
  Cancellation& abandoned() { return abandoned_; }

 private:
  // Returns whether the transfer had not ended before.
  bool EndWith(absl::Status reason);

  const ExpectedTransfer expected_;
  CacheWriter* const writer_;
  Cancellation abandoned_;

  mutable absl::Mutex mu_;
  std::unique_ptr<TransferCheck> check_ ABSL_GUARDED_BY(mu_);  // once opened
  std::optional<::prefill::v1::PrefillResult> result_ ABSL_GUARDED_BY(mu_);
  absl::Status status_ ABSL_GUARDED_BY(mu_);
  absl::Time last_sign_of_life_ ABSL_GUARDED_BY(mu_) = absl::Now();
};

// The transfers that are waited for, by id. Thread-safe.
class PendingTransfers {
 public:
  // Expects a transfer until Unregister. ALREADY_EXISTS: the id is in use.
  absl::Status Register(const std::string& id, std::shared_ptr<PendingTransfer> transfer);
  void Unregister(const std::string& id);
  // Gives the transfer to the call that delivers it; each can be claimed once. NOT_FOUND: nobody
  // waits for it.
  absl::StatusOr<std::shared_ptr<PendingTransfer>> Claim(const std::string& id);

 private:
  struct Entry {
    std::shared_ptr<PendingTransfer> transfer;
    bool claimed = false;
  };
  absl::Mutex mu_;
  absl::flat_hash_map<std::string, Entry> entries_ ABSL_GUARDED_BY(mu_);
};

}  // namespace prefilld::client

#endif  // PREFILLD_CLIENT_DECODE_WORKER_PENDING_TRANSFERS_H_
