// Stackful coroutines for the emulator: one per CUDA thread of a block, switched by hand in a few nanoseconds.
//
// A fiber runs until it calls yield() or its function returns. All fibers of a pool belong to one system thread. An
// exception must not leave a fiber's function. For tests only.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <vector>

namespace nb::emulation {

/// Stacks that are used again from one launch to the next.
class FiberPool {
 public:
  FiberPool();
  ~FiberPool();
  FiberPool(const FiberPool&) = delete;
  FiberPool& operator=(const FiberPool&) = delete;

  /// Makes fibers 0 to count - 1, each of which will call `body(index)` from its beginning. Fibers of before that have
  /// not ended are dropped; nothing on their stacks is destroyed.
  void start(int count, std::function<void(int)> body);

  /// Runs fiber `index` until it yields or ends; whether it has ended. Must be called from outside of fibers.
  bool resume(int index);

  /// Gives control back to resume(). Must be called from a fiber.
  void yield();

 private:
  struct Fiber;
  static void enter(FiberPool* pool);

  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::function<void(int)> body_;
  Fiber* current_ = nullptr;
  void* outside_ = nullptr;  // stack pointer of resume()
  const void* outside_bottom_ = nullptr;
  std::size_t outside_size_ = 0;
};

}  // namespace nb::emulation
