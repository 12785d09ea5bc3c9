#include "cuda_emulation/device.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <utility>

#include "cuda/table.h"
#include "cuda_emulation/emulator.h"
#include "ops/cpu/reference/reference.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, bytes) static_cast<void>(0)
#define ASAN_UNPOISON_MEMORY_REGION(address, bytes) static_cast<void>(0)
#endif

namespace nb::emulation {
namespace {

constexpr unsigned char kPoison = 0xcd;
constexpr std::size_t kUnit = 256;   // sizes and addresses are multiples of it
constexpr std::size_t kFence = 256;  // poisoned bytes behind a piece
constexpr std::size_t kPage = 4096;
constexpr std::size_t kReserved = std::size_t{8} << 30;  // of addresses

[[noreturn]] void give_up(const char* what) {
  std::fprintf(stderr, "device memory: %s\n", what);
  std::abort();
}

std::size_t room_for(std::size_t bytes) { return (bytes + kUnit - 1) / kUnit * kUnit + kFence; }

/// One stretch of addresses, filled from the front; what comes back is handed out again to requests of its size.
class Memory {
 public:
  Memory() {
    void* base = mmap(nullptr, kReserved, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) give_up("no addresses");
    base_ = static_cast<unsigned char*>(base);
  }

  void open() {
    const std::lock_guard lock(mutex_);
    if (depth_++ == 0) protect(PROT_READ | PROT_WRITE);
  }
  void close() {
    const std::lock_guard lock(mutex_);
    if (--depth_ == 0) protect(PROT_NONE);
  }

  void* allocate(std::size_t bytes) {
    const std::lock_guard lock(mutex_);
    if (bytes > limit_ - std::min(in_use_, limit_)) return nullptr;
    const std::size_t room = room_for(bytes);
    unsigned char* data = nullptr;
    if (const auto found = returned_.find(room); found != returned_.end()) {
      data = found->second;
      returned_.erase(found);
    } else {
      if (used_ + room > kReserved) return nullptr;
      data = base_ + used_;
      used_ += room;
    }
    open();
    protect(PROT_READ | PROT_WRITE);  // of what has just been added
    ASAN_UNPOISON_MEMORY_REGION(data, room);
    std::memset(data, kPoison, room);
    close();
    ASAN_POISON_MEMORY_REGION(data + bytes, room - bytes);  // reads past the end are found too
    pieces_[data] = bytes;
    in_use_ += bytes;
    return data;
  }

  void release(void* pointer) {
    const std::lock_guard lock(mutex_);
    const auto found = pieces_.find(pointer);
    if (found == pieces_.end()) give_up("a piece was given back that is not handed out");
    auto* data = static_cast<unsigned char*>(pointer);
    const std::size_t bytes = found->second, room = room_for(bytes);
    open();
    ASAN_UNPOISON_MEMORY_REGION(data, room);
    const bool whole = std::all_of(data + bytes, data + room, [](unsigned char byte) { return byte == kPoison; });
    close();
    if (!whole) give_up("something was written past the end of a piece");
    ASAN_POISON_MEMORY_REGION(data, room);
    in_use_ -= bytes;
    pieces_.erase(found);
    returned_.emplace(room, data);
  }

  std::size_t in_use() const { return in_use_; }
  std::size_t free_bytes() const { return limit_ - in_use_; }
  void set_limit(std::size_t bytes) { limit_ = bytes; }

 private:
  void protect(int protection) {
    const std::size_t bytes = (used_ + kPage - 1) / kPage * kPage;
    if (bytes > 0 && mprotect(base_, bytes, protection) != 0) give_up("mprotect failed");
  }

  std::recursive_mutex mutex_;  // copies beside the kernels come from another thread
  unsigned char* base_ = nullptr;
  std::size_t used_ = 0;
  std::size_t in_use_ = 0;
  std::size_t limit_ = std::size_t{4} << 30;
  int depth_ = 0;
  std::map<void*, std::size_t> pieces_;
  std::multimap<std::size_t, unsigned char*> returned_;
};

Memory& memory() {
  static Memory* const memory = [] {
    set_launch_hooks({.before = [] { emulation::memory().open(); }, .after = [] { emulation::memory().close(); }});
    return new Memory();  // outlives every static that holds a piece
  }();
  return *memory;
}

struct Opened {
  Opened() { memory().open(); }
  ~Opened() { memory().close(); }
};

void copy(void* to, const void* from, std::size_t bytes) {
  const Opened opened;
  std::memcpy(to, from, bytes);
}

void fill(void* to, unsigned char value, std::size_t bytes) {
  const Opened opened;
  std::memset(to, value, bytes);
}

DeviceCalls calls;
Refusal refusal = Refusal::none;
thread_local std::unique_ptr<Recording> recording;

/// What a graph cannot hold, or must not: memory would move under it, and the host would wait for nothing.
void check_not_recording(const char* what) {
  if (recording_of_thread() == nullptr) return;
  std::fprintf(stderr, "device memory: %s while work is recorded\n", what);
  std::abort();
}

/// Does it, or keeps it for a graph.
void start_or_keep(std::function<void()> work) {
  if (Recording* const kept = recording_of_thread()) {
    kept->push_back(std::move(work));
  } else {
    work();
  }
}

bool begin_recording() {
  check_not_recording("recording begun");
  if (refusal == Refusal::at_begin) return false;
  recording = std::make_unique<Recording>();
  record_into(recording.get());
  return true;
}

void* end_recording() {
  if (recording_of_thread() == nullptr) give_up("a recording ended that was not begun");
  record_into(nullptr);
  const std::unique_ptr<Recording> ended = std::move(recording);
  if (refusal == Refusal::at_end) return nullptr;
  ++calls.graphs, ++calls.graphs_alive;
  return new Recording(std::move(*ended));
}

void replay(void* graph) {
  check_not_recording("replay");
  ++calls.replays;
  for (const auto& work : *static_cast<const Recording*>(graph)) work();
}

void delete_graph(void* graph) {
  --calls.graphs_alive;
  delete static_cast<Recording*>(graph);
}

const ops::KernelTable& reference() {
  static const ops::KernelTable& table = ops::reference_kernels();
  return table;
}

}  // namespace

const DeviceMemory& device_memory() {
  static const DeviceMemory table = {
      .name = "cuda-emulated",
      .allocate =
          [](std::size_t bytes) {
            check_not_recording("allocate");
            return memory().allocate(bytes);
          },
      .release =
          [](void* data) {
            check_not_recording("release");
            memory().release(data);
          },
      .copy_in =
          [](void* to, const void* from, std::size_t bytes) {
            check_not_recording("copy_in");
            ++calls.copies_in;
            copy(to, from, bytes);
          },
      .copy_out =
          [](void* to, const void* from, std::size_t bytes) {
            check_not_recording("copy_out");
            ++calls.copies_out;
            copy(to, from, bytes);
          },
      .copy_within = [](void* to, const void* from,
                        std::size_t bytes) { start_or_keep([=] { copy(to, from, bytes); }); },
      .fill = [](void* to, unsigned char value, std::size_t bytes) { start_or_keep([=] { fill(to, value, bytes); }); },
      .free_bytes = [] { return memory().free_bytes(); },
      .take_error = []() -> const char* { return nullptr; },  // the emulator throws
      .pin = [](void*, std::size_t) { return true; },
      .unpin = [](void*) {},
      .copy_in_beside =
          [](void* to, const void* from, std::size_t bytes) {
            copy(to, from, bytes);
            return true;
          },
      .new_mark = []() -> void* { return new char; },  // a kernel is done when it was started
      .delete_mark = [](void* mark) { delete static_cast<char*>(mark); },
      .set_mark = [](void*) {},
      .wait_for = [](void*) {},
      .begin_recording = begin_recording,
      .end_recording = end_recording,
      .replay = replay,
      .delete_graph = delete_graph,
  };
  return table;
}

DeviceCalls device_calls() { return calls; }
void refuse_recording(Refusal how) { refusal = how; }

std::size_t device_bytes_in_use() { return memory().in_use(); }
void set_device_bytes(std::size_t bytes) { memory().set_limit(bytes); }

const ops::Backend& backend() {
  static const ops::Backend backend{.name = device_memory().name,
                                    .kernels = &cuda::kernels(device_memory()),
                                    .deterministic = &cuda::deterministic_kernels(device_memory()),
                                    .device = Device{DeviceKind::cuda, 0},
                                    .hardware = "",
                                    .why_not = ""};
  return backend;
}

const ops::Backend& reference_backend() {
  static const ops::KernelTable table = [] {
    ops::KernelTable copy = reference();
    copy.name = "reference-on-device";
    copy.memory = &device_memory();
#define NB_WITH_ACCESS(op, Args)                          \
  copy.op = [](const ops::Args& args, const Part& part) { \
    start_or_keep([=] {                                   \
      const Opened access;                                \
      reference().op(args, part);                         \
    });                                                   \
  }
    NB_WITH_ACCESS(embed, EmbedArgs);
    NB_WITH_ACCESS(rms_norm, RmsNormArgs);
    NB_WITH_ACCESS(prepare, PrepareArgs);
    NB_WITH_ACCESS(linear, LinearArgs);
    NB_WITH_ACCESS(rope, RopeArgs);
    NB_WITH_ACCESS(kv_write, KvWriteArgs);
    NB_WITH_ACCESS(key_deviation, KeyDeviationArgs);
    NB_WITH_ACCESS(summarize_kv, SummarizeKvArgs);
    NB_WITH_ACCESS(kv_seal, KvSealArgs);
    NB_WITH_ACCESS(attention, AttentionArgs);
    NB_WITH_ACCESS(silu_mul, SiluMulArgs);
    NB_WITH_ACCESS(argmax, ArgmaxArgs);
#undef NB_WITH_ACCESS
    return copy;
  }();
  static const ops::Backend backend{.name = table.name,
                                    .kernels = &table,
                                    .deterministic = &table,
                                    .device = Device{DeviceKind::cuda, 0},
                                    .hardware = "",
                                    .why_not = ""};
  return backend;
}

}  // namespace nb::emulation
