// What an engine's thread has to say to one reader: outputs in order, put in once a step.
//
// Outputs of one answer that nobody has read yet become one, so an outbox never holds more of them than there are
// answers. Any thread may call anything.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "engine/engine.h"

namespace nb::engine {

/// Adds what a later step did for the same answer.
void append(StepOutput& output, StepOutput&& later);

class Outbox {
 public:
  enum class Wake {
    each_step,  ///< as soon as there is an output
    ends,       ///< when an answer has ended: for readers who do not stream
  };

  using Seconds = std::chrono::duration<double>;

  explicit Outbox(Wake wake = Wake::each_step) : wake_(wake) {}

  /// Waits for what the reader wants to be woken for, at most `timeout`, then takes all outputs that are there, in the
  /// order in which their answers spoke first. Returns at once when the outbox is closed.
  std::vector<StepOutput> wait(Seconds timeout);

  /// Takes what is there.
  std::vector<StepOutput> poll() { return wait(Seconds::zero()); }

  /// Waits until every answer has ended, at most `timeout`; whether they have.
  bool wait_for_ends(Seconds timeout);

  /// Answers whose end has not been put in yet.
  int num_unfinished() const;

  /// Wakes the reader; nothing is waited for any more. What comes later is still kept.
  void close();
  bool closed() const;

 private:
  friend class EngineThread;
  void expect(int num_answers);
  void put(std::vector<StepOutput> outputs);

  const Wake wake_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<StepOutput> outputs_;
  std::unordered_map<std::uint64_t, std::size_t> places_;  // of an answer's output in outputs_
  int num_ends_ = 0;                                       // among outputs_
  int num_unfinished_ = 0;
  bool closed_ = false;
};

}  // namespace nb::engine
