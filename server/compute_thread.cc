#include "server/compute_thread.h"

#include <cstdint>

#include "server/event_count.h"
#include "server/scheduler.h"

namespace prefilld::server {

ComputeThread::ComputeThread(Scheduler& scheduler, EventCount& wake)
    : scheduler_(scheduler), wake_(wake), thread_([this] { Run(); }) {}

ComputeThread::~ComputeThread() {
  stop_ = true;
  wake_.Notify();
  thread_.join();
}

void ComputeThread::Run() {
  while (!stop_) {
    const int64_t events = wake_.count();
    if (!scheduler_.StepOnce() && !stop_) wake_.AwaitAfter(events);
  }
}

}  // namespace prefilld::server
