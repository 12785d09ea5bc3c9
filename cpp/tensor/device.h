// Names of the places where memory lives and kernels run.
//
// Not for querying hardware (ops/backends.h does that). Safe to use from any thread.
#pragma once

#include <string>

namespace nb {

enum class DeviceKind { cpu, cuda };

struct Device {
  DeviceKind kind = DeviceKind::cpu;
  int index = 0;

  friend bool operator==(const Device&, const Device&) = default;
};

/// "cpu" or "cuda:<index>".
inline std::string to_string(Device device) {
  return device.kind == DeviceKind::cpu ? "cpu" : "cuda:" + std::to_string(device.index);
}

}  // namespace nb
