#ifndef PREFILLD_MODEL_DEVICE_STOPWATCH_H_
#define PREFILLD_MODEL_DEVICE_STOPWATCH_H_

#include <chrono>
#include <cstdint>

namespace prefilld::model {

// Measures wall time in laps, for the stages of a layer.
class Stopwatch {
 public:
  // Returns the microseconds since construction or the last lap.
  int64_t LapUs() {
    const Clock::time_point now = Clock::now();
    const auto lap = std::chrono::duration_cast<std::chrono::microseconds>(now - lap_start_);
    lap_start_ = now;
    return lap.count();
  }

 private:
  using Clock = std::chrono::steady_clock;
  Clock::time_point lap_start_ = Clock::now();
};

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_DEVICE_STOPWATCH_H_
