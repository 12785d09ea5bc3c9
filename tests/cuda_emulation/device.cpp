#include "cuda_emulation/device.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>

#include "cuda/table.h"

namespace nb::emulation {
namespace {

constexpr int kPoison = 0xcd;

std::map<void*, std::size_t> pieces;
std::size_t in_use = 0;
std::size_t limit = std::numeric_limits<std::size_t>::max();

void* allocate(std::size_t bytes) {
  if (bytes > limit - std::min(in_use, limit)) return nullptr;
  void* data = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  if (data == nullptr) return nullptr;
  std::memset(data, kPoison, bytes);
  pieces[data] = bytes;
  in_use += bytes;
  return data;
}

void release(void* data) {
  const auto found = pieces.find(data);
  if (found == pieces.end()) std::abort();  // not from here, or twice
  in_use -= found->second;
  pieces.erase(found);
  std::free(data);
}

void copy(void* to, const void* from, std::size_t bytes) { std::memcpy(to, from, bytes); }
void fill(void* to, unsigned char value, std::size_t bytes) { std::memset(to, value, bytes); }
std::size_t free_bytes() { return limit - in_use; }
const char* take_error() { return nullptr; }  // the emulator throws

}  // namespace

const DeviceMemory& device_memory() {
  static const DeviceMemory memory = {.name = "cuda-emulated",
                                      .allocate = allocate,
                                      .release = release,
                                      .copy_in = copy,
                                      .copy_out = copy,
                                      .copy_within = copy,
                                      .fill = fill,
                                      .free_bytes = free_bytes,
                                      .take_error = take_error};
  return memory;
}

std::size_t device_bytes_in_use() { return in_use; }
void set_device_bytes(std::size_t bytes) { limit = bytes; }

const ops::Backend& backend() {
  static const ops::Backend backend{.name = device_memory().name,
                                    .kernels = &cuda::kernels(device_memory()),
                                    .deterministic = &cuda::deterministic_kernels(device_memory()),
                                    .device = Device{DeviceKind::cuda, 0},
                                    .hardware = "",
                                    .why_not = ""};
  return backend;
}

}  // namespace nb::emulation
