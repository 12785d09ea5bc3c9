// Writes what the engine does as a trace for chrome://tracing or ui.perfetto.dev: steps with their phases, and
// requests.
//
// JSON array format of the Trace Event Format (Google): complete events ("X") of steps and phases on one track, and for
// each answer nestable asynchronous events ("b", "n", "e") from submission to end. One write a step, whole events only,
// so that memory is bounded and the file can be read although its closing bracket is missing because the process died.
// Numbers only, no text of users. Not for counters (metrics.h). Used by the thread that runs steps.
#pragma once

#include <fstream>
#include <string>

#include "base/ids.h"
#include "engine/metrics.h"
#include "engine/request.h"

namespace nb::engine {

/// What a step says about itself.
struct StepSummary {
  std::int64_t index = 0;  ///< forward passes before this one
  int rows = 0;
  int prompt_rows = 0;
  int sequences = 0;             ///< that computed
  std::int64_t preemptions = 0;  ///< in this step
  int running = 0;               ///< after it
  int waiting = 0;
  bool failed = false;  ///< it threw: nothing was committed
};

/// Which answer to which request.
struct AnswerId {
  RequestId request;
  int choice;
};

class StepTrace {
 public:
  /// Replaces the file. Throws io naming the path if it cannot be written.
  explicit StepTrace(const std::string& path);
  /// Closes the array. Requests that have not ended stay open.
  ~StepTrace();
  StepTrace(const StepTrace&) = delete;
  StepTrace& operator=(const StepTrace&) = delete;

  void submitted(AnswerId id, int num_prompt, Clock::time_point at);

  // Between the beginning of a step and step(): parts of it, in order of time.
  void phase(const char* name, Clock::time_point begin, Clock::time_point end);
  void first_step(AnswerId id, Clock::time_point at);
  void first_token(AnswerId id, Clock::time_point at);
  void ended(AnswerId id, FinishReason reason, int num_generated, int num_cached, Clock::time_point at);

  /// Ends a step and writes it. If the file takes no more, says so in the log, once, and nothing is traced from then
  /// on.
  void step(const StepSummary& summary, Clock::time_point begin, Clock::time_point end);

 private:
  double microseconds(Clock::time_point at) const;
  void async_event(std::string& text, const char* kind, const char* name, AnswerId id, Clock::time_point at,
                   const std::string& arguments);
  void write(std::string& text);

  std::string path_;
  std::ofstream file_;
  Clock::time_point origin_;
  std::string before_;  // events since the last step
  std::string during_;  // events inside the step that has not ended
};

/// Adds the time of its life to a counter, and to the trace if there is one.
class PhaseTimer {
 public:
  PhaseTimer(double& seconds, StepTrace* trace, const char* name)
      : seconds_(seconds), trace_(trace), name_(name), begin_(Clock::now()) {}
  ~PhaseTimer() {
    const Clock::time_point end = Clock::now();
    seconds_ += milliseconds(end - begin_) / 1e3;
    if (trace_ != nullptr) trace_->phase(name_, begin_, end);
  }
  PhaseTimer(const PhaseTimer&) = delete;
  PhaseTimer& operator=(const PhaseTimer&) = delete;

 private:
  double& seconds_;
  StepTrace* trace_;
  const char* name_;
  Clock::time_point begin_;
};

}  // namespace nb::engine
