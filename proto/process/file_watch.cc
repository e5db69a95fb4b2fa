#include "proto/process/file_watch.h"

#include <utility>

#include "absl/time/clock.h"
#include "proto/process/log.h"

namespace prefilld::process {
namespace {

constexpr absl::Duration kPeriod = absl::Seconds(1);

}  // namespace

FileWatch::FileWatch(std::vector<Subject> subjects) : subjects_(std::move(subjects)) {
  for (const Subject& subject : subjects_) seen_.push_back(subject.read);
  if (!subjects_.empty()) thread_.emplace([this] { Run(); });
}

FileWatch::~FileWatch() {
  stop_.Notify();
  if (thread_.has_value()) thread_->join();
}

void FileWatch::Run() {
  do {
    Look();
  } while (!stop_.WaitForNotificationWithTimeout(kPeriod));
}

// Files that are being written change from one look to the next.
void FileWatch::Look() {
  absl::MutexLock lock(&mu_);
  for (size_t i = 0; i < subjects_.size(); ++i) {
    Subject& subject = subjects_[i];
    std::string now = subject.versions();
    if (now == seen_[i] && now != subject.read) {
      subject.read = now;
      subject.reload(/*ordered=*/false);
    }
    seen_[i] = std::move(now);
    if (subject.at_each_look != nullptr) subject.at_each_look(absl::Now());
  }
}

void FileWatch::ReloadNow() {
  absl::MutexLock lock(&mu_);
  if (subjects_.empty()) LogEvent(LogLevel::kInfo, "nothing_to_reload", {});
  for (Subject& subject : subjects_) {
    subject.read = subject.versions();
    subject.reload(/*ordered=*/true);
  }
}

}  // namespace prefilld::process
