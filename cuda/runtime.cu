// The stream, the memory and the errors of the device. Host code only: it has no twin in the emulator, which has memory
// of its own (tests/cuda_emulation/device.cpp).
#include "cuda/runtime.h"

#include <atomic>
#include <cstdio>
#include <cstring>
#include <mutex>

#include "cuda/launch.cuh"

namespace nb::cuda {
namespace {

constexpr int kOldestMajor = 8;  // Ampere: cp.async and products of bf16 matrices

// ---- errors ----

std::mutex error_mutex;
char first_error[512] = "";                     // guarded by error_mutex
std::atomic<const char*> last_kernel{nullptr};  // started, or tried to
std::atomic<cudaStream_t> created_stream{nullptr};

// Of the calling thread. Work is recorded on a stream of its own: what other threads start meanwhile goes on.
struct Recording {
  cudaStream_t stream = nullptr;  // null: this thread does not record
  bool failed = false;
};
thread_local Recording recording;

// After some errors every further call fails with the same one.
bool device_is_lost() {
  cudaStream_t const where = created_stream.load();
  if (where == nullptr) return false;
  const cudaError_t state = cudaStreamQuery(where);
  return state != cudaSuccess && state != cudaErrorNotReady;
}

// Keeps the first error. What a kernel does wrong is often told by a later call, so the last kernel is named too.
void note(cudaError_t error, const char* what, bool is_kernel) {
  if (error == cudaSuccess || error == cudaErrorCudartUnloading) return;
  cudaGetLastError();                 // takes it back, where that is possible
  if (recording.stream != nullptr) {  // told by end_recording()
    recording.failed = true;
    return;
  }
  const std::lock_guard lock(error_mutex);
  if (first_error[0] != '\0') return;
  const char* const kernel = is_kernel ? nullptr : last_kernel.load(std::memory_order_relaxed);
  std::snprintf(first_error, sizeof(first_error), "%s%s: %s (%s)%s%s%s", is_kernel ? "kernel " : "", what,
                cudaGetErrorString(error), cudaGetErrorName(error),
                kernel != nullptr ? "; the last kernel started was " : "", kernel != nullptr ? kernel : "",
                device_is_lost() ? "; this process cannot use the device any more" : "");
}

const char* take_error() {
  thread_local char taken[sizeof(first_error)];
  const std::lock_guard lock(error_mutex);
  if (first_error[0] == '\0') return nullptr;
  std::memcpy(taken, first_error, sizeof(taken));
  first_error[0] = '\0';
  return taken;
}

cudaStream_t create_stream() {
  cudaStream_t created = nullptr;
  note(cudaStreamCreateWithFlags(&created, cudaStreamNonBlocking), "creating a stream", false);
  created_stream.store(created);
  return created;
}

// ---- staging ----

// Pinned memory through which everything goes to the device, so that copy_in() returns while the copy is under way.
// Pieces are cut off one chunk after the other; a chunk is used again when its event has passed. It lives as long as
// the process: when static objects are destroyed, the driver may be gone.
struct Staging {
  static constexpr std::size_t kChunkBytes = std::size_t{4} << 20;
  static constexpr std::size_t kAlignment = 64;
  static constexpr int kChunks = 4;

  std::mutex mutex;
  unsigned char* memory = nullptr;
  cudaEvent_t events[kChunks] = {};  // recorded when a chunk is full
  int chunk = 0;
  std::size_t used = 0;  // of that chunk

  bool start() {
    if (memory != nullptr) return true;
    for (cudaEvent_t& event : events) {
      if (event != nullptr) continue;
      const cudaError_t error = cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
      note(error, "creating an event", false);
      if (error != cudaSuccess) return false;
    }
    void* pinned = nullptr;
    const cudaError_t error = cudaHostAlloc(&pinned, kChunks * kChunkBytes, cudaHostAllocDefault);
    note(error, "allocating pinned memory", false);
    memory = static_cast<unsigned char*>(pinned);
    return error == cudaSuccess;
  }

  void next_chunk() {
    note(cudaEventRecord(events[chunk], stream()), "recording an event", false);
    chunk = (chunk + 1) % kChunks;
    used = 0;
    note(cudaEventSynchronize(events[chunk]), "waiting for a copy", false);  // at once, if it was never recorded
  }

  void copy(unsigned char* to, const unsigned char* from, std::size_t bytes) {
    const std::lock_guard lock(mutex);
    if (!start()) return;
    while (bytes > 0) {
      if (used >= kChunkBytes) next_chunk();
      const std::size_t left = kChunkBytes - used;
      const std::size_t piece = bytes < left ? bytes : left;
      unsigned char* const staged = memory + static_cast<std::size_t>(chunk) * kChunkBytes + used;
      std::memcpy(staged, from, piece);
      note(cudaMemcpyAsync(to, staged, piece, cudaMemcpyHostToDevice, stream()), "copying to the device", false);
      used += (piece + kAlignment - 1) / kAlignment * kAlignment;
      to += piece;
      from += piece;
      bytes -= piece;
    }
  }
};

// ---- memory ----

void* allocate(std::size_t bytes) {
  void* data = nullptr;
  const cudaError_t error = cudaMalloc(&data, bytes);
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();  // told by the null pointer
    return nullptr;
  }
  note(error, "allocating memory", false);
  return data;
}

void release(void* data) {
  note(cudaStreamSynchronize(stream()), "waiting for the device", false);
  note(cudaFree(data), "releasing memory", false);
}

void copy_in(void* to, const void* from, std::size_t bytes) {
  static Staging staging;
  staging.copy(static_cast<unsigned char*>(to), static_cast<const unsigned char*>(from), bytes);
}

void copy_out(void* to, const void* from, std::size_t bytes) {
  note(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream()), "copying to the host", false);
  note(cudaStreamSynchronize(stream()), "waiting for the device", false);
}

void copy_within(void* to, const void* from, std::size_t bytes) {
  note(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream()), "copying on the device", false);
}

void fill(void* to, unsigned char value, std::size_t bytes) {
  note(cudaMemsetAsync(to, value, bytes, stream()), "filling memory", false);
}

std::size_t free_bytes() {
  std::size_t free = 0, total = 0;
  note(cudaMemGetInfo(&free, &total), "asking for free memory", false);
  return free;
}

// ---- beside the kernels ----

bool pin(void* data, std::size_t bytes) {
  const cudaError_t error = cudaHostRegister(data, bytes, cudaHostRegisterDefault);
  if (error != cudaSuccess) cudaGetLastError();  // told by what is returned
  return error == cudaSuccess;
}

void unpin(void* data) { note(cudaHostUnregister(data), "unpinning memory", false); }

// Whoever waits for one sleeps: a reader of weights does it all the time.
cudaEvent_t new_event() {
  cudaEvent_t event = nullptr;
  note(cudaEventCreateWithFlags(&event, cudaEventDisableTiming | cudaEventBlockingSync), "creating an event", false);
  return event;
}

// For the copies of one thread after the other.
struct Beside {
  std::mutex mutex;
  cudaStream_t stream = nullptr;
  cudaEvent_t copied = nullptr;

  bool start() {
    if (copied != nullptr) return true;
    if (stream == nullptr) {
      note(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "creating a stream", false);
    }
    if (stream != nullptr) copied = new_event();
    return copied != nullptr;
  }
};

bool copy_in_beside(void* to, const void* from, std::size_t bytes) {
  static Beside& beside = *new Beside();  // lives as long as the process, like Staging
  const std::lock_guard lock(beside.mutex);
  if (!beside.start()) return false;
  cudaError_t error = cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, beside.stream);
  if (error == cudaSuccess) error = cudaEventRecord(beside.copied, beside.stream);
  if (error == cudaSuccess) error = cudaEventSynchronize(beside.copied);
  note(error, "copying to the device beside its work", false);
  return error == cudaSuccess;
}

void* new_mark() { return new_event(); }

void delete_mark(void* mark) { note(cudaEventDestroy(static_cast<cudaEvent_t>(mark)), "destroying an event", false); }

void set_mark(void* mark) {
  note(cudaEventRecord(static_cast<cudaEvent_t>(mark), stream()), "recording an event", false);
}

void wait_for(void* mark) {
  note(cudaEventSynchronize(static_cast<cudaEvent_t>(mark)), "waiting for the device", false);
}

// ---- graphs ----

bool begin_recording() {
  cudaStream_t created = nullptr;
  cudaError_t error = cudaStreamCreateWithFlags(&created, cudaStreamNonBlocking);
  if (error == cudaSuccess) error = cudaStreamBeginCapture(created, cudaStreamCaptureModeThreadLocal);
  if (error == cudaSuccess) {
    recording = {.stream = created};
    return true;
  }
  cudaGetLastError();  // told by what is returned
  if (created != nullptr) cudaStreamDestroy(created);
  return false;
}

void* end_recording() {
  const Recording ended = recording;
  recording = {};
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t started = nullptr;
  cudaError_t error = cudaStreamEndCapture(ended.stream, &graph);
  if (error == cudaSuccess && !ended.failed) error = cudaGraphInstantiate(&started, graph, 0);
  if (error != cudaSuccess) {
    cudaGetLastError();  // told by the null pointer
    started = nullptr;
  }
  if (graph != nullptr) cudaGraphDestroy(graph);
  cudaStreamDestroy(ended.stream);
  return started;
}

void replay(void* graph) {
  last_kernel.store("a graph", std::memory_order_relaxed);
  note(cudaGraphLaunch(static_cast<cudaGraphExec_t>(graph), stream()), "starting a graph", false);
}

void delete_graph(void* graph) {
  note(cudaStreamSynchronize(stream()), "waiting for the device", false);
  note(cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(graph)), "destroying a graph", false);
}

// ---- the device ----

// The oldest architecture this library has code for, as 80 for 8.0.
int oldest_architecture() {
  constexpr int kArchitectures[] = {__CUDA_ARCH_LIST__};  // of nvcc: 800, 890, ...
  int oldest = kArchitectures[0];
  for (const int architecture : kArchitectures) oldest = architecture < oldest ? architecture : oldest;
  return oldest / 10;
}

DeviceFacts look() {
  DeviceFacts facts{};
  const auto refuse = [&facts](const char* format, auto... values) {
    std::snprintf(facts.why_unusable, sizeof(facts.why_unusable), format, values...);
    return facts;
  };
  int driver = 0, runtime = 0, count = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  if (driver == 0) return refuse("%s", "no NVIDIA driver");
  const cudaError_t counted = cudaGetDeviceCount(&count);
  if (counted == cudaErrorInsufficientDriver) {
    return refuse("the NVIDIA driver is too old: it knows CUDA %d.%d, this library needs %d.0 or newer", driver / 1000,
                  driver % 1000 / 10, runtime / 1000);
  }
  if (counted == cudaErrorNoDevice || (counted == cudaSuccess && count == 0)) {
    return refuse("%s", "no NVIDIA GPU (or CUDA_VISIBLE_DEVICES hides it)");
  }
  if (counted != cudaSuccess) return refuse("the NVIDIA driver fails: %s", cudaGetErrorString(counted));
  cudaDeviceProp properties{};
  const cudaError_t asked = cudaGetDeviceProperties(&properties, 0);
  if (asked != cudaSuccess) return refuse("the GPU does not answer: %s", cudaGetErrorString(asked));
  std::snprintf(facts.name, sizeof(facts.name), "%s", properties.name);
  facts.total_bytes = properties.totalGlobalMem;
  const int architecture = 10 * properties.major + properties.minor;
  if (properties.major < kOldestMajor) {
    return refuse("%s has compute capability %d.%d; %d.0 or newer is needed", facts.name, properties.major,
                  properties.minor, kOldestMajor);
  }
  if (architecture < oldest_architecture()) {
    return refuse("%s has compute capability %d.%d; this library was built for %d.%d and newer", facts.name,
                  properties.major, properties.minor, oldest_architecture() / 10, oldest_architecture() % 10);
  }
  return facts;
}

}  // namespace

cudaStream_t stream() {
  if (recording.stream != nullptr) return recording.stream;
  static cudaStream_t const created = create_stream();
  return created;
}

void note_error(cudaError_t error, const char* what) {
  last_kernel.store(what, std::memory_order_relaxed);
  note(error, what, true);
}

const DeviceFacts& device_facts() {
  static const DeviceFacts facts = look();
  return facts;
}

const DeviceMemory& device_memory() {
  static const DeviceMemory memory = {.name = "cuda:0",
                                      .allocate = allocate,
                                      .release = release,
                                      .copy_in = copy_in,
                                      .copy_out = copy_out,
                                      .copy_within = copy_within,
                                      .fill = fill,
                                      .free_bytes = free_bytes,
                                      .take_error = take_error,
                                      .pin = pin,
                                      .unpin = unpin,
                                      .copy_in_beside = copy_in_beside,
                                      .new_mark = new_mark,
                                      .delete_mark = delete_mark,
                                      .set_mark = set_mark,
                                      .wait_for = wait_for,
                                      .begin_recording = begin_recording,
                                      .end_recording = end_recording,
                                      .replay = replay,
                                      .delete_graph = delete_graph};
  return memory;
}

}  // namespace nb::cuda
