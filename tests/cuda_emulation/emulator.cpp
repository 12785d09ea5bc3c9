#include "cuda_emulation/emulator.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <set>
#include <span>
#include <sstream>
#include <stdexcept>
#include <utility>
#include <vector>

#include "cuda_emulation/fiber.h"

namespace nb::emulation {

namespace {

constexpr std::size_t kSharedBytes = 228 << 10;  // of an H100 or H200 block, at most
constexpr unsigned char kPoison = 0xcd;
constexpr int kNobody = -1;
constexpr int kMany = -2;

// What has happened to a byte of shared memory.
struct Trace {
  int writer = kNobody;
  int reader = kNobody;       // since the last write: a thread, or kMany
  int reader_warp = kNobody;  // the same for its warp
  unsigned write_epoch = 0;
  unsigned write_warp_epoch = 0;
  unsigned read_epoch = 0;
  unsigned read_warp_epoch = 0;
};

struct Exchange {
  WarpData data;
  int left = 0;  // lanes that have not taken their result
};

struct PendingCopy {
  void* to;
  const void* from;
  std::size_t bytes;
  std::size_t zero_bytes;
  Where where;
};

enum class State { running, at_barrier, at_collective, ended };

struct Thread {
  ThreadPlace place;
  Where where;
  unsigned mask = 0;                // of the collective it waits in
  const char* operation = nullptr;  // of the same
  Exchange* exchange = nullptr;
  std::vector<std::vector<PendingCopy>> copies;
  std::vector<PendingCopy> open_copies;
};

struct Gathering {
  unsigned mask;
  Exchange* exchange;  // null while nobody waits
};

struct Warp {
  unsigned epoch = 1;
  std::vector<Gathering> gatherings;  // one for every mask, of which there are few
  std::vector<std::unique_ptr<Exchange>> exchanges;
};

struct Block {
  const char* kernel = nullptr;
  Launch launch;
  std::vector<Thread> threads;
  std::vector<State> states;  // of the threads: beside each other, since all are looked at again and again
  unsigned epoch = 1;
  std::vector<Warp> warps;  // of the largest block so far
  alignas(128) std::byte shared[kSharedBytes];
  std::vector<Trace> traces;
  std::size_t shared_used = 0;
  std::map<const void*, std::byte*> sites;
  int current = 0;
  Thread* running = nullptr;  // the current one
  std::exception_ptr error;
};

Order order = Order::forward;
LaunchHooks hooks;
std::set<std::string> run_kernels;
thread_local Recording* recording = nullptr;
std::atomic<std::size_t> started{0};

struct Machine {
  FiberPool fibers;
  Block block;
  bool busy = false;
};

Machine machine;

Block& block() { return machine.block; }
Thread& self() { return *block().running; }

std::string name_of(const Where& where) {
  std::string file = where.file_name();
  file.erase(0, file.rfind('/') + 1);
  return file + ":" + std::to_string(where.line());
}

std::string name_of(const Thread& thread) {
  std::ostringstream out;
  const ThreadPlace& place = thread.place;
  out << "block (" << place.block.x << ", " << place.block.y << ", " << place.block.z << ") thread (" << place.thread.x
      << ", " << place.thread.y << ", " << place.thread.z << ")";
  return out.str();
}

void wait_as(State state, const Where& where) {
  block().states[static_cast<std::size_t>(block().current)] = state;
  self().where = where;
  machine.fibers.yield();
}

std::size_t warp_of(int thread) { return static_cast<std::size_t>(thread) / 32; }

// Whether the calling thread may rely on what `other` did in the given epochs.
bool is_ordered_after(int other, unsigned epoch, unsigned warp_epoch) {
  const Block& b = block();
  if (other == b.current || epoch < b.epoch) return true;
  return warp_of(other) == warp_of(b.current) && warp_epoch < b.warps[warp_of(b.current)].epoch;
}

bool is_shared(const void* address) {
  const auto* byte = static_cast<const std::byte*>(address);
  return byte >= block().shared && byte < block().shared + kSharedBytes;
}

std::span<Trace> traces_of(const void* address, std::size_t bytes, const Where& where) {
  const std::size_t begin = static_cast<std::size_t>(static_cast<const std::byte*>(address) - block().shared);
  if (begin + bytes > block().shared_used) fail("goes past the end of shared memory", where);
  if (reinterpret_cast<std::uintptr_t>(address) % std::min<std::size_t>(bytes, 16) != 0 && (bytes & (bytes - 1)) == 0) {
    fail("misaligned access of " + std::to_string(bytes) + " bytes to shared memory", where);
  }
  return std::span(block().traces).subspan(begin, bytes);
}

void report_stuck() {
  const Block& b = block();
  std::ostringstream out;
  out << "kernel " << b.kernel << ": threads wait for others that never come:";
  std::map<std::string, int> waits;
  for (std::size_t i = 0; i < b.threads.size(); ++i) {
    const Thread& thread = b.threads[i];
    std::ostringstream what;
    if (b.states[i] == State::ended) {
      what << "ended";
    } else if (b.states[i] == State::at_barrier) {
      what << "at the barrier in " << name_of(thread.where);
    } else {
      what << "at " << thread.operation << " with mask 0x" << std::hex << thread.mask << std::dec << " in "
           << name_of(thread.where);
    }
    ++waits[what.str()];
  }
  for (const auto& [what, count] : waits) out << "\n  " << count << " threads " << what;
  out << "\n  first: " << name_of(b.threads.front());
  throw std::runtime_error(out.str());
}

// Lets threads out of a barrier that all have reached. False if none is there.
bool release_barrier() {
  Block& b = block();
  const Where& first = b.threads.front().where;
  for (const State state : b.states) {
    if (state != State::at_barrier) return false;
  }
  for (const Thread& thread : b.threads) {
    if (thread.where.line() != first.line() || std::strcmp(thread.where.file_name(), first.file_name()) != 0)
      return false;
  }
  ++b.epoch;
  for (Warp& warp : b.warps) ++warp.epoch;
  std::fill(b.states.begin(), b.states.end(), State::running);
  return true;
}

void run_block(const std::function<void()>& kernel) {
  Block& b = block();
  const int count = static_cast<int>(b.threads.size());
  FiberPool& fibers = machine.fibers;
  fibers.start(count, [&](int index) {
    try {
      kernel();
      Thread& thread = b.threads[static_cast<std::size_t>(index)];
      const bool left =
          std::any_of(thread.copies.begin(), thread.copies.end(), [](const auto& c) { return !c.empty(); });
      if (left || !thread.open_copies.empty()) fail("ends with asynchronous copies not waited for");
    } catch (...) {
      if (!b.error) b.error = std::current_exception();
    }
  });
  while (true) {
    bool progress = false;
    int num_ended = 0;
    for (int i = 0; i < count; ++i) {
      const int index = order == Order::forward ? i : count - 1 - i;
      State& state = b.states[static_cast<std::size_t>(index)];
      if (state == State::ended) ++num_ended;
      if (state != State::running) continue;
      progress = true;
      b.current = index;
      b.running = &b.threads[static_cast<std::size_t>(index)];
      if (fibers.resume(index)) state = State::ended;
      if (b.error) std::rethrow_exception(b.error);
    }
    if (num_ended == count) return;
    if (!progress && !release_barrier()) report_stuck();
  }
}

}  // namespace

void set_order(Order wanted) { order = wanted; }
void set_launch_hooks(const LaunchHooks& wanted) { hooks = wanted; }

bool has_run(const std::string& kernel_name) { return run_kernels.contains(kernel_name); }
std::set<std::string> take_run_kernels() { return std::exchange(run_kernels, {}); }

void record_into(Recording* wanted) { recording = wanted; }
Recording* recording_of_thread() { return recording; }
std::size_t num_started() { return started; }

void start(const char* kernel_name, const Launch& launch, std::function<void()> kernel) {
  if (recording == nullptr) {
    ++started;
    run(kernel_name, launch, kernel);
    return;
  }
  recording->push_back([=, kept = std::move(kernel)] { run(kernel_name, launch, kept); });
}

void run(const char* kernel_name, const Launch& launch, const std::function<void()>& kernel) {
  if (machine.busy) throw std::runtime_error("a kernel launched a kernel, or two system threads launch at once");
  machine.busy = true;
  struct Idle {
    ~Idle() {
      machine.busy = false;
      if (hooks.after != nullptr) hooks.after();
    }
  } idle;
  if (hooks.before != nullptr) hooks.before();
  const Dim3& dim = launch.block;
  const unsigned count = dim.x * dim.y * dim.z;
  if (count == 0 || count > 1024) {
    throw std::runtime_error(std::string(kernel_name) + ": a block of " + std::to_string(count) + " threads");
  }
  if (launch.dynamic_shared_bytes > kSharedBytes) {
    throw std::runtime_error(std::string(kernel_name) + ": too much dynamic shared memory");
  }
  run_kernels.insert(kernel_name);
  Block& b = block();
  b.kernel = kernel_name;
  b.launch = launch;
  b.traces.resize(kSharedBytes);
  const Dim3& grid = launch.grid;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        const std::size_t used = std::max(b.shared_used, launch.dynamic_shared_bytes);
        std::memset(b.shared, kPoison, used);
        std::fill_n(b.traces.begin(), used, Trace{});
        b.shared_used = (launch.dynamic_shared_bytes + 127) / 128 * 128;
        b.sites.clear();
        b.error = nullptr;
        b.epoch = 1;
        b.warps.resize(std::max<std::size_t>(b.warps.size(), (count + 31) / 32));
        for (Warp& warp : b.warps) {
          warp.epoch = 1;
          for (Gathering& gathering : warp.gatherings) gathering.exchange = nullptr;
          for (const auto& exchange : warp.exchanges) exchange->left = 0;
        }
        b.states.assign(count, State::running);
        b.threads.assign(count, {});
        for (unsigned i = 0; i < count; ++i) {
          b.threads[i].place = {.thread = {i % dim.x, i / dim.x % dim.y, i / dim.x / dim.y},
                                .block = {x, y, z},
                                .block_dim = dim,
                                .grid_dim = grid,
                                .lane = static_cast<int>(i % 32)};
        }
        run_block(kernel);
      }
    }
  }
}

const ThreadPlace& place() { return self().place; }

void fail(const std::string& what, const Where& where) {
  throw std::runtime_error(std::string("kernel ") + block().kernel + ", " + name_of(self()) + ", " + name_of(where) +
                           ": " + what);
}

void sync_threads(const Where& where) { wait_as(State::at_barrier, where); }

void sync_warp(unsigned mask, const Where& where) {
  // Only a barrier of the whole warp orders its accesses here; what fewer lanes agree upon does not count.
  const auto advance = [mask](WarpData&) {
    if (mask == 0xffffffffu) ++block().warps[warp_of(block().current)].epoch;
  };
  collective(mask, "__syncwarp", nullptr, 0, nullptr, 0, advance, where);
}

void collective(unsigned mask, const char* operation, const void* in, std::size_t in_bytes, void* out,
                std::size_t out_bytes, const std::function<void(WarpData&)>& compute, const Where& where) {
  Block& b = block();
  const int lane = self().place.lane;
  Warp& warp = b.warps[warp_of(b.current)];
  const std::size_t first = warp_of(b.current) * 32;
  const auto present = static_cast<unsigned>(std::min<std::size_t>(32, b.threads.size() - first));
  const unsigned existing = present == 32 ? 0xffffffffu : (1u << present) - 1;
  if ((mask >> lane & 1u) == 0) fail(std::string(operation) + ": the mask does not name the calling lane", where);
  if ((mask & ~existing) != 0) fail(std::string(operation) + ": the mask names lanes that do not exist", where);
  auto gathering =
      std::find_if(warp.gatherings.begin(), warp.gatherings.end(), [&](const auto& g) { return g.mask == mask; });
  if (gathering == warp.gatherings.end()) gathering = warp.gatherings.insert(gathering, {mask, nullptr});
  if (gathering->exchange == nullptr) {
    auto unused =
        std::find_if(warp.exchanges.begin(), warp.exchanges.end(), [](const auto& e) { return e->left == 0; });
    if (unused == warp.exchanges.end()) unused = warp.exchanges.insert(unused, std::make_unique<Exchange>());
    gathering->exchange = unused->get();
    gathering->exchange->data.mask = 0;
    gathering->exchange->left = -1;  // taken
  }
  Exchange* const exchange = gathering->exchange;
  Thread& thread = self();
  thread.mask = mask;
  thread.operation = operation;
  thread.exchange = exchange;
  if (in_bytes > 0) std::memcpy(exchange->data.in[lane], in, in_bytes);
  exchange->data.mask |= 1u << lane;
  if (exchange->data.mask != mask) {
    wait_as(State::at_collective, where);
  } else {
    gathering->exchange = nullptr;
    exchange->left = 0;
    for (int l = 0; l < 32; ++l) {
      if ((mask >> l & 1u) == 0) continue;
      const std::size_t index = first + static_cast<std::size_t>(l);
      const Thread& other = b.threads[index];
      if (other.operation != operation && std::strcmp(other.operation, operation) != 0) {
        fail(std::string(operation) + ": " + name_of(other) + " is at " + other.operation, where);
      }
      ++exchange->left;
      if (l != lane) b.states[index] = State::running;
    }
    compute(exchange->data);
  }
  if (out_bytes > 0) std::memcpy(out, exchange->data.out[lane], out_bytes);
  --exchange->left;
}

// ---- shared memory ----

std::byte* shared_memory(const void* site, std::size_t bytes, std::size_t alignment) {
  Block& b = block();
  const auto found = b.sites.find(site);
  if (found != b.sites.end()) return found->second;
  const std::size_t begin = (b.shared_used + alignment - 1) / alignment * alignment;
  if (begin + bytes > kSharedBytes) fail("more shared memory than a block can have");
  b.shared_used = begin + bytes;
  return b.sites[site] = b.shared + begin;
}

std::byte* dynamic_shared_memory() { return block().shared; }

void on_read(const void* address, std::size_t bytes, const Where& where) {
  if (!is_shared(address)) return;
  const Block& b = block();
  const int warp = static_cast<int>(warp_of(b.current));
  const unsigned warp_epoch = b.warps[warp_of(b.current)].epoch;
  for (Trace& trace : traces_of(address, bytes, where)) {
    if (trace.writer == kNobody) fail("reads shared memory that nobody wrote", where);
    if (!is_ordered_after(trace.writer, trace.write_epoch, trace.write_warp_epoch)) {
      fail("reads shared memory that " + name_of(b.threads[static_cast<std::size_t>(trace.writer)]) +
               " wrote, without a barrier between",
           where);
    }
    const bool fresh = trace.reader == kNobody || trace.read_epoch < b.epoch;
    trace.reader = fresh || trace.reader == b.current ? b.current : kMany;
    trace.reader_warp = fresh || trace.reader_warp == warp ? warp : kMany;
    trace.read_epoch = b.epoch;
    trace.read_warp_epoch = warp_epoch;
  }
}

void on_write(const void* address, std::size_t bytes, const Where& where) {
  if (!is_shared(address)) return;
  const Block& b = block();
  const int warp = static_cast<int>(warp_of(b.current));
  const unsigned warp_epoch = b.warps[warp_of(b.current)].epoch;
  for (Trace& trace : traces_of(address, bytes, where)) {
    if (trace.writer != kNobody && !is_ordered_after(trace.writer, trace.write_epoch, trace.write_warp_epoch)) {
      fail("writes shared memory that " + name_of(b.threads[static_cast<std::size_t>(trace.writer)]) +
               " wrote, without a barrier between",
           where);
    }
    const bool ordered = trace.reader == kNobody || trace.reader == b.current || trace.read_epoch < b.epoch ||
                         (trace.reader_warp == warp && trace.read_warp_epoch < warp_epoch);
    if (!ordered) {
      fail("writes shared memory that another thread read, without a barrier between", where);
    }
    trace = {.writer = b.current,
             .reader = kNobody,
             .reader_warp = kNobody,
             .write_epoch = b.epoch,
             .write_warp_epoch = warp_epoch,
             .read_epoch = 0,
             .read_warp_epoch = 0};
  }
}

void copy_async(void* to, const void* from, std::size_t bytes, std::size_t zero_bytes, const Where& where) {
  on_write(to, bytes + zero_bytes, where);
  for (Trace& trace : traces_of(to, bytes + zero_bytes, where)) trace.writer = kNobody;
  std::memset(to, kPoison, bytes + zero_bytes);
  self().open_copies.push_back({to, from, bytes, zero_bytes, where});
}

void copy_async_commit() {
  Thread& thread = self();
  thread.copies.push_back(std::move(thread.open_copies));
  thread.open_copies.clear();
}

void copy_async_wait(int groups_left) {
  Thread& thread = self();
  while (static_cast<int>(thread.copies.size()) > groups_left) {
    for (const PendingCopy& copy : thread.copies.front()) {
      on_write(copy.to, copy.bytes + copy.zero_bytes, copy.where);
      std::memcpy(copy.to, copy.from, copy.bytes);
      std::memset(static_cast<std::byte*>(copy.to) + copy.bytes, 0, copy.zero_bytes);
    }
    thread.copies.erase(thread.copies.begin());
  }
}

}  // namespace nb::emulation
