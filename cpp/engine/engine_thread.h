// An engine with a thread of its own: any thread submits, cancels and asks; the engine's thread makes the steps.
//
// Requests go into an inbox that is emptied between two steps; what a step did goes into the outboxes of its requests,
// one wake-up each. Answers are those of Engine. The destructor ends everything, as close() does.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <future>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "engine/engine.h"
#include "engine/outbox.h"

namespace nb::engine {

class EngineThread {
 public:
  /// As Engine. `model` must outlive this object.
  EngineThread(const model::Model& model, const EngineOptions& options);
  ~EngineThread() { close(); }
  EngineThread(const EngineThread&) = delete;
  EngineThread& operator=(const EngineThread&) = delete;

  /// Queues a request whose outputs go to `outbox`; returns its id. A final output always comes, whatever happens.
  /// Throws as Engine::submit(), overloaded when draining, invalid_argument when closed, or what broke the engine.
  RequestId submit(Request request, std::shared_ptr<Outbox> outbox);

  /// Ends a request with `abort` in the next step. Unknown ids are ignored.
  void cancel(RequestId id);

  /// The same for all requests of an outbox.
  void cancel_all(const Outbox& outbox);

  /// What is submitted between hold() and release() enters one step together. Calls may nest.
  void hold();
  void release();

  /// Runs `what` between two steps, on the engine's thread, and waits for it; rethrows what it throws. Throws
  /// invalid_argument when closed, or what broke the engine.
  void call(std::function<void(Engine&)> what);

  /// Of the last step, with what has been submitted since.
  EngineStats stats() const;

  /// Refuses new requests and waits, at most `timeout`, until those there have ended; whether they have.
  bool drain(Outbox::Seconds timeout);

  /// Refuses new requests, ends those there with `abort` and stops the thread. The thread and its team, which may run
  /// foreign code (see TokenConstraint), cannot wait for their own end: there this returns at once, and the destructor
  /// must not run.
  void close();

  /// Whether the caller makes the steps: it is the thread, or one of the team that works for it.
  bool is_this_thread() const { return std::this_thread::get_id() == thread_id_ || engine_.model().pool().is_worker(); }

  const EngineOptions& options() const { return engine_.options(); }

 private:
  struct Owner {
    std::shared_ptr<Outbox> outbox;
    std::vector<int> choices;  // of answers that have not ended
  };
  struct Arrival {
    RequestId id;
    std::vector<std::unique_ptr<Sequence>> answers;
  };

  void wake();
  void work();
  bool take_inbox();
  std::vector<StepOutput> step();
  void deliver(std::vector<StepOutput> outputs);
  void give_up(const Error& error);

  mutable std::mutex mutex_;
  std::condition_variable arrived_;
  Engine engine_;  // of the thread, but for prepare() and options(); behind what its threads use to wake ours
  std::condition_variable ended_;
  std::vector<Arrival> inbox_;
  std::vector<RequestId> cancelled_;
  std::vector<std::packaged_task<void(Engine&)>> calls_;
  std::map<RequestId, Owner> owners_;  // of requests that have not ended
  int num_unfinished_ = 0;             // answers of all owners
  EngineStats stats_;
  RequestId next_id_ = 1;
  int num_holds_ = 0;
  bool draining_ = false;
  bool closed_ = false;
  std::optional<Error> broken_;
  std::vector<Arrival> arrivals_;                          // of the thread
  std::vector<RequestId> cancels_;                         // of the thread
  std::vector<std::packaged_task<void(Engine&)>> called_;  // of the thread
  int num_failures_ = 0;                                   // of the thread: steps that failed in a row
  std::mutex join_;                                        // who closes
  std::thread thread_;
  std::thread::id thread_id_;
};

}  // namespace nb::engine
