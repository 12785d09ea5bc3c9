// Waiting on a condition variable for any length of time, infinity included.
//
// The standard functions add the duration to a clock, which overflows. Not for the barrier of the thread team
// (threads.h).
#pragma once

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <mutex>

namespace nb {

/// Waits until `condition` holds, at most `timeout`; whether it holds.
template <class Condition>
bool wait_at_most(std::condition_variable& changed, std::unique_lock<std::mutex>& lock,
                  std::chrono::duration<double> timeout, const Condition& condition) {
  constexpr std::chrono::duration<double> kPiece{3600.0};
  for (; timeout > kPiece; timeout -= kPiece) {
    if (changed.wait_for(lock, kPiece, condition)) return true;
  }
  return changed.wait_for(lock, std::max(timeout, std::chrono::duration<double>::zero()), condition);
}

}  // namespace nb
