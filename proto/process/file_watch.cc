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

FileWatch::~FileWatch() { Stop(absl::InfiniteDuration()); }

bool FileWatch::Stop(absl::Duration patience) {
  if (!thread_.has_value()) return true;
  {
    absl::MutexLock lock(&mu_);
    stop_ = true;
    if (!mu_.AwaitWithTimeout(absl::Condition(&stopped_), patience)) return false;
  }
  thread_->join();
  thread_.reset();
  return true;
}

void FileWatch::Run() {
  mu_.Lock();
  const auto has_to_do = [this]()
                             ABSL_SHARED_LOCKS_REQUIRED(mu_) { return stop_ || done_ < ordered_; };
  while (!stop_) {
    const int64_t ordered = ordered_;
    const bool is_ordered = done_ < ordered;
    look_began_ = absl::Now();
    mu_.Unlock();
    Look(is_ordered);
    mu_.Lock();
    look_began_ = absl::InfiniteFuture();
    done_ = ordered;
    mu_.AwaitWithTimeout(absl::Condition(&has_to_do), kPeriod);
  }
  stopped_ = true;
  mu_.Unlock();
}

// Files that are being written change from one look to the next.
void FileWatch::Look(bool ordered) {
  for (size_t i = 0; i < subjects_.size(); ++i) {
    Subject& subject = subjects_[i];
    std::string now = subject.versions();
    if (ordered || (now == seen_[i] && now != subject.read)) {
      subject.read = now;
      subject.reload(ordered);
    }
    seen_[i] = std::move(now);
    if (subject.at_each_look != nullptr) subject.at_each_look(absl::Now());
  }
}

bool FileWatch::ReloadNow(absl::Duration patience) {
  if (subjects_.empty()) {
    LogEvent(LogLevel::kInfo, "nothing_to_reload", {});
    return true;
  }
  absl::MutexLock lock(&mu_);
  const absl::Duration since = absl::Now() - look_began_;
  if (since > kLong) {
    LogEvent(LogLevel::kWarning, "files_hang", {{"for_s", absl::ToDoubleSeconds(since)}});
  }
  const int64_t mine = ++ordered_;
  const auto is_done = [this, mine]() ABSL_SHARED_LOCKS_REQUIRED(mu_) { return done_ >= mine; };
  return mu_.AwaitWithTimeout(absl::Condition(&is_done), patience);
}

}  // namespace prefilld::process
