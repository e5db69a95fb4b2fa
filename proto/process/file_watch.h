// Notices that files of a running process have changed, or is told so by its operator.
#ifndef PREFILLD_PROTO_PROCESS_FILE_WATCH_H_
#define PREFILLD_PROTO_PROCESS_FILE_WATCH_H_

#include <functional>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "absl/time/time.h"

namespace prefilld::process {

// Looks at all files of a process every second, on one thread, and has those read again that have
// changed and come to rest. Thread-safe.
class FileWatch {
 public:
  // Files that are read together. Its functions are called by one thread at a time, and must not
  // wait for long.
  struct Subject {
    // Returns a text that changes when the files do, as wire::FileVersions.
    std::function<std::string()> versions;
    // The versions just before the files were read; a change between the two is seen then.
    std::string read;
    // Reads the files again. `ordered`: by an operator, who waits for a line in the log whatever
    // there is to say.
    std::function<void(bool ordered)> reload;
    std::function<void(absl::Time now)> at_each_look = nullptr;  // may be null
  };

  // All that the functions refer to must outlive this. Without subjects this does nothing.
  explicit FileWatch(std::vector<Subject> subjects);
  ~FileWatch();

  // Reads all files now, on an operator's word (SIGHUP).
  void ReloadNow();

 private:
  void Run();
  void Look() ABSL_LOCKS_EXCLUDED(mu_);

  absl::Mutex mu_;  // held while files are read
  std::vector<Subject> subjects_ ABSL_GUARDED_BY(mu_);
  std::vector<std::string> seen_ ABSL_GUARDED_BY(mu_);  // versions at the latest look
  absl::Notification stop_;
  std::optional<std::thread> thread_;
};

}  // namespace prefilld::process

#endif  // PREFILLD_PROTO_PROCESS_FILE_WATCH_H_
