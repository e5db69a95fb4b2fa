// The load of the soak: honest callers, and everything that goes wrong around them.
#ifndef PREFILLD_TESTS_INTEGRATION_SOAK_LOAD_H_
#define PREFILLD_TESTS_INTEGRATION_SOAK_LOAD_H_

#include <atomic>
#include <cstdint>
#include <initializer_list>
#include <map>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "tests/integration/soak/known_answers.h"

namespace prefilld::integration {

// Counts how things ended, by who did them. Thread-safe.
class Tally {
 public:
  // OK and the codes in `accepted` are as it should be; everything else is a failure of the soak.
  void Count(const std::string& who, const absl::Status& status,
             std::initializer_list<absl::StatusCode> accepted = {});
  // Prints a line for each of them.
  void Print() const;
  int64_t failures() const;

 private:
  mutable absl::Mutex mu_;
  std::map<std::string, std::map<std::string, int64_t>> ends_ ABSL_GUARDED_BY(mu_);
  int64_t failures_ ABSL_GUARDED_BY(mu_) = 0;
};

// The worker is asked to continue the first so many of the known prompts.
inline constexpr size_t kShortPrompts = 4;

struct LoadOptions {
  std::string prefilld;  // addresses
  std::string prefilld_metrics;
  std::string worker;  // a decode worker that nobody harms
  // Flags of further decode workers, which are stopped and killed.
  std::vector<std::string> worker_flags;
  std::string prompt_file;  // the ids of a long prompt, for prefill-cli
  // The tokens that the worker answered to short prompts before the load.
  std::vector<std::vector<uint32_t>> generated;
  uint32_t generated_tokens = 4;
};

// Runs everybody for so long and waits until the last one has ended.
void RunLoad(const LoadOptions& options, const KnownAnswers& known, absl::Duration time,
             Tally& tally);

// Asks the worker for the tokens that follow the known prompt.
absl::StatusOr<std::vector<uint32_t>> AskWorker(const LoadOptions& options,
                                                const KnownAnswers& known, size_t prompt);

}  // namespace prefilld::integration

#endif  // PREFILLD_TESTS_INTEGRATION_SOAK_LOAD_H_
