// A device of host memory whose work is done later, by a thread of its own, so that a test sees who does not wait for
// it.
//
// For tests only. There is one, since DeviceMemory is functions without a place for state.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>

#include "tensor/device_memory.h"

namespace nb::test {

class QueuedDevice {
 public:
  static QueuedDevice& get() {
    static QueuedDevice device;
    return device;
  }

  /// Begins a piece of work, like a kernel.
  void launch(std::function<void()> work) {
    const std::lock_guard lock(mutex_);
    queue_.push_back(std::move(work));
    ++begun_;
    changed_.notify_all();
  }

  /// Until everything is done.
  void finish() { wait_until(begun()); }

  const DeviceMemory& memory() const { return table_; }

  // What a test may change and read; as they were with reset().
  bool pins = true, copies = true;
  std::atomic<int> pieces{0}, marks{0}, pinned{0}, copied{0};
  int marks_left = 1 << 20;

  void reset() { pins = copies = true, marks_left = 1 << 20, copied = 0; }

 private:
  struct Mark {
    std::atomic<std::size_t> begun{0};
  };

  QueuedDevice() : worker_([this] { work(); }) {}
  ~QueuedDevice() {
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    changed_.notify_all();
    worker_.join();
  }

  std::size_t begun() {
    const std::lock_guard lock(mutex_);
    return begun_;
  }

  void wait_until(std::size_t count) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return done_ >= count; });
  }

  void work() {
    std::unique_lock lock(mutex_);
    while (true) {
      changed_.wait(lock, [&] { return stopping_ || !queue_.empty(); });
      if (queue_.empty()) return;
      const std::function<void()> next = std::move(queue_.front());
      queue_.pop_front();
      lock.unlock();
      next();
      lock.lock();
      ++done_;
      changed_.notify_all();
    }
  }

  DeviceMemory table_ = {
      .name = "queued:0",
      .allocate =
          [](std::size_t bytes) {
            ++get().pieces;
            return std::malloc(bytes);
          },
      .release =
          [](void* data) {
            get().finish();
            --get().pieces;
            std::free(data);
          },
      .copy_in = [](void* to, const void* from, std::size_t bytes) { get().finish(), std::memcpy(to, from, bytes); },
      .copy_out = [](void* to, const void* from, std::size_t bytes) { get().finish(), std::memcpy(to, from, bytes); },
      .copy_within = [](void* to, const void* from,
                        std::size_t bytes) { get().finish(), std::memmove(to, from, bytes); },
      .fill = [](void* to, unsigned char value, std::size_t bytes) { get().finish(), std::memset(to, value, bytes); },
      .free_bytes = [] { return std::size_t{1} << 30; },
      .take_error = []() -> const char* { return nullptr; },
      .pin =
          [](void*, std::size_t) {
            if (get().pins) ++get().pinned;
            return get().pins;
          },
      .unpin = [](void*) { --get().pinned; },
      .copy_in_beside =
          [](void* to, const void* from, std::size_t bytes) {
            if (!get().copies) return false;
            ++get().copied;
            std::memcpy(to, from, bytes);
            return true;
          },
      .new_mark = []() -> void* {
        if (get().marks_left-- <= 0) return nullptr;
        ++get().marks;
        return new Mark;
      },
      .delete_mark =
          [](void* mark) {
            --get().marks;
            delete static_cast<Mark*>(mark);
          },
      .set_mark = [](void* mark) { static_cast<Mark*>(mark)->begun = get().begun(); },
      .wait_for = [](void* mark) { get().wait_until(static_cast<Mark*>(mark)->begun); },
      .begin_recording = [] { return false; },
      .end_recording = []() -> void* { return nullptr; },
      .replay = [](void*) {},
      .delete_graph = [](void*) {},
  };

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> queue_;
  std::size_t begun_ = 0, done_ = 0;
  bool stopping_ = false;
  std::thread worker_;
};

}  // namespace nb::test
