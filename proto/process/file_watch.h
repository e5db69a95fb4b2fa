// Notices that files of a running process have changed, or is told so by its operator.
#ifndef PREFILLD_PROTO_PROCESS_FILE_WATCH_H_
#define PREFILLD_PROTO_PROCESS_FILE_WATCH_H_

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

namespace prefilld::process {

// Looks at all files of a process every second, on one thread, and has those read again that have
// changed and come to rest. A file of a network's file system may hang for as long as its server
// is away, so nobody else reads files or waits for this thread without a limit. Thread-safe.
class FileWatch {
 public:
  // Files that are read together. Its functions are called by one thread at a time, and must not
  // wait for anything but files.
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
  // Waits for a look that is under way, however long it takes.
  ~FileWatch();

  // Has all files read again, on an operator's word (SIGHUP), and waits for that, but at most for
  // `patience`. Returns whether they were. Logs files_hang if a look takes for longer than kLong.
  bool ReloadNow(absl::Duration patience = absl::ZeroDuration());
  static constexpr absl::Duration kLong = absl::Seconds(5);

  // Ends the looking; for one thread. Returns false, after `patience`, if a file hangs: the process
  // had better end then without destroying this and what its functions refer to.
  bool Stop(absl::Duration patience);
  static constexpr absl::Duration kEndPatience = absl::Seconds(2);  // of a process that ends

 private:
  void Run();
  void Look(bool ordered);

  std::vector<Subject> subjects_;  // of the thread
  std::vector<std::string> seen_;  // versions at the latest look; of the thread

  absl::Mutex mu_;
  int64_t ordered_ ABSL_GUARDED_BY(mu_) = 0;  // looks that an operator has asked for
  int64_t done_ ABSL_GUARDED_BY(mu_) = 0;     // up to this one
  absl::Time look_began_ ABSL_GUARDED_BY(mu_) = absl::InfiniteFuture();  // the one under way
  bool stop_ ABSL_GUARDED_BY(mu_) = false;
  bool stopped_ ABSL_GUARDED_BY(mu_) = false;
  std::optional<std::thread> thread_;
};

}  // namespace prefilld::process

#endif  // PREFILLD_PROTO_PROCESS_FILE_WATCH_H_
