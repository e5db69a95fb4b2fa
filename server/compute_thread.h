#ifndef PREFILLD_SERVER_COMPUTE_THREAD_H_
#define PREFILLD_SERVER_COMPUTE_THREAD_H_

#include <atomic>
#include <thread>

namespace prefilld::server {

class EventCount;
class Scheduler;

// The thread that steps a scheduler. It sleeps when there is nothing to compute.
class ComputeThread {
 public:
  ComputeThread(Scheduler& scheduler, EventCount& wake);
  // Returns after the current step.
  ~ComputeThread();

 private:
  void Run();

  Scheduler& scheduler_;
  EventCount& wake_;
  std::atomic<bool> stop_ = false;
  std::thread thread_;
};

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_COMPUTE_THREAD_H_
