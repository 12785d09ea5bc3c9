// The memory of a device as a struct of functions, filled by the library that drives it.
//
// Plain data, so that it can cross from a library that was opened at run time. Not for host memory (allocator.h). Calls
// are ordered with the kernels of that library and made by the thread that runs steps, or that loads a model; those
// that say so may be made by another, beside it.
#pragma once

#include <cstddef>

#include "tensor/allocator.h"

namespace nb {

/// None of these throws. What fails is told by take_error(); see check().
struct DeviceMemory {
  const char* name;                                                    ///< "cuda:0"
  void* (*allocate)(std::size_t bytes);                                ///< null if there is not enough
  void (*release)(void* data);                                         ///< waits for what uses it
  void (*copy_in)(void* to, const void* from, std::size_t bytes);      ///< from host memory, which is free at once
  void (*copy_out)(void* to, const void* from, std::size_t bytes);     ///< to host memory; waits for all work before
  void (*copy_within)(void* to, const void* from, std::size_t bytes);  ///< from device memory to device memory
  void (*fill)(void* to, unsigned char value, std::size_t bytes);
  std::size_t (*free_bytes)();  ///< of the device, for everybody who uses it
  const char* (*take_error)();  ///< the first error since the last call, from kernels too; null if there was none

  /// Makes host memory such that the device reads it by itself; false where the system does not allow it.
  bool (*pin)(void* data, std::size_t bytes);
  void (*unpin)(void* data);
  /// Copies host memory in beside the kernels, in no order with them, and returns when the bytes are there; false if
  /// they are not. For any thread. Pinned memory is copied at the rate of the bus.
  bool (*copy_in_beside)(void* to, const void* from, std::size_t bytes);

  void* (*new_mark)();  ///< a point of the work, not set yet; null if the device has no more
  void (*delete_mark)(void* mark);
  void (*set_mark)(void* mark);  ///< it is now where all the work lies before that was begun so far
  void (*wait_for)(void* mark);  ///< until that work is done; at once for one that is not set. For any thread

  /// From now on what the calling thread starts, kernels, copy_within() and fill(), is kept with its arguments and not
  /// done. Until end_recording() this thread may call nothing else here. False if that cannot be begun.
  bool (*begin_recording)();
  /// What was started since, as a graph; null if that could not be kept, which take_error() does not tell.
  void* (*end_recording)();
  void (*replay)(void* graph);  ///< starts all of it, in the order in which it was recorded
  void (*delete_graph)(void* graph);
};

/// Throws a device error with what take_error() says, if anything.
void check(const DeviceMemory& memory);

/// A piece of its own, not from a pool. Throws out_of_memory with the numbers.
Buffer allocate_on(const DeviceMemory& memory, std::size_t bytes);

/// Such a piece with a copy of host memory.
Buffer copy_to(const DeviceMemory& memory, const void* data, std::size_t bytes);

}  // namespace nb
