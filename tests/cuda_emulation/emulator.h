// Runs CUDA kernels on the CPU, thread by thread, and watches them: what a machine without a GPU can prove about a
// kernel.
//
// A kernel is an ordinary function that the emulator calls once for every thread of every block; blocks run one after
// the other, the threads of a block as fibers. Reported as errors: barriers and warp collectives that not all threads
// reach, reads of shared memory that nobody wrote, and two threads at one place of shared memory without a barrier
// between them. The arithmetic is that of the CPU. For tests only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <set>
#include <source_location>
#include <string>
#include <vector>

namespace nb::emulation {

struct Dim3 {
  unsigned x = 1;
  unsigned y = 1;
  unsigned z = 1;
};

struct Launch {
  Dim3 grid;
  Dim3 block;
  std::size_t dynamic_shared_bytes = 0;
};

/// In which order threads of a block get their turn. A kernel that needs one of them is wrong.
enum class Order { forward, reversed };
void set_order(Order order);

/// Runs a kernel to its end. Throws std::runtime_error that names the kernel, block and thread and says what it did.
void run(const char* kernel_name, const Launch& launch, const std::function<void()>& kernel);

/// Work that is kept: kernels with copies of their arguments.
using Recording = std::vector<std::function<void()>>;

/// Where start() of the calling thread keeps kernels from now on; null: it runs them.
void record_into(Recording* recording);
Recording* recording_of_thread();

/// What a launch does: runs the kernel, or keeps it. The name is that of something that lives as long as the program.
void start(const char* kernel_name, const Launch& launch, std::function<void()> kernel);

/// Kernels that start() ran at once, ever.
std::size_t num_started();

/// Called before and after every kernel; none by default.
struct LaunchHooks {
  void (*before)() = nullptr;
  void (*after)() = nullptr;
};
void set_launch_hooks(const LaunchHooks& hooks);

/// Kernels that have run in this process, by name.
bool has_run(const std::string& kernel_name);

/// Names of the kernels that have run since the last call.
std::set<std::string> take_run_kernels();

// ---- for kernels: what the calling thread is, and what it waits for ----

using Where = std::source_location;

struct ThreadPlace {
  Dim3 thread;
  Dim3 block;
  Dim3 block_dim;
  Dim3 grid_dim;
  int lane;
};
const ThreadPlace& place();

/// Ends the launch with an error in the calling thread's name.
[[noreturn]] void fail(const std::string& what, const Where& where = Where::current());

void sync_threads(const Where& where);
void sync_warp(unsigned mask, const Where& where);

/// The most bytes a lane brings to a collective or takes from it.
inline constexpr std::size_t kLaneBytes = 64;

/// What a collective sees: the input of every lane of the mask, and where their results go.
struct WarpData {
  unsigned mask = 0;
  alignas(16) std::byte in[32][kLaneBytes];
  alignas(16) std::byte out[32][kLaneBytes];
};

/// Waits until all lanes of `mask` are here with the same `operation`, has one of them compute the results of all.
void collective(unsigned mask, const char* operation, const void* in, std::size_t in_bytes, void* out,
                std::size_t out_bytes, const std::function<void(WarpData&)>& compute, const Where& where);

// ---- shared memory ----

/// Memory of the running block, the same for all threads that ask with the same `site`; not initialised.
std::byte* shared_memory(const void* site, std::size_t bytes, std::size_t alignment);
std::byte* dynamic_shared_memory();

/// To be called before shared memory is read or written; other memory is not looked at.
void on_read(const void* address, std::size_t bytes, const Where& where);
void on_write(const void* address, std::size_t bytes, const Where& where);

/// What cp.async does: the bytes arrive when the group they were committed in has been waited for. Until then the place
/// counts as unwritten.
void copy_async(void* to, const void* from, std::size_t bytes, std::size_t zero_bytes, const Where& where);
void copy_async_commit();
void copy_async_wait(int groups_left);

}  // namespace nb::emulation
