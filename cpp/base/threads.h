// A fixed team of threads that runs one parallel phase at a time, with a barrier that spins briefly, then sleeps.
//
// The caller's thread is member 0, so a pool of one runs everything inline. Work is split statically by the callee
// from (index, count); results never depend on the split. `run` may be called by one thread at a time. Not a task
// queue.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "base/part.h"

namespace nb {

class ThreadPool {
 public:
  using Phase = void (*)(const void* context, const Part& part);

  /// Starts `num_threads - 1` workers. Throws invalid_argument unless 1 <= num_threads <= 256.
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return num_threads_; }

  /// Whether the caller is one of the threads that the pool has started.
  bool is_worker() const;

  /// Calls `phase(context, part)` once per member and returns when all are done. `phase` must not throw. Sets the
  /// default floating-point environment (round to nearest, no flush to zero) on every member for the phase.
  void run(Phase phase, const void* context);

  /// As above for any callable taking `const Part&`.
  template <class Function>
  void run(const Function& function) {
    run([](const void* context, const Part& part) { (*static_cast<const Function*>(context))(part); }, &function);
  }

  /// Threads worth starting on this machine: the processors this process may run on.
  static int default_num_threads();

 private:
  struct alignas(64) Flag {
    std::atomic<std::uint32_t> value{0};
  };

  void worker(int index);
  static void wait_team(void* pool);
  void barrier();
  static void await_change(std::atomic<std::uint32_t>& flag, std::uint32_t old);

  int num_threads_;
  Phase phase_ = nullptr;
  const void* context_ = nullptr;
  Flag generation_;          // bumped by member 0 to start a phase
  Flag arrived_;             // members that reached the current barrier
  Flag barrier_generation_;  // bumped by the last arrival
  std::atomic<bool> stopping_{false};
  std::vector<std::thread> workers_;
};

}  // namespace nb
