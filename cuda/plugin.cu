// The only symbol of this library: what the core asks when it has opened it (cpp/ops/device_plugin.h).
#include "cuda/runtime.h"
#include "cuda/table.h"
#include "ops/device_plugin.h"

extern "C" __attribute__((visibility("default"))) const nb::ops::DevicePlugin* nb_device_plugin() {
  using nb::ops::DevicePlugin;
  static const DevicePlugin plugin = [] {
    const nb::cuda::DeviceFacts& facts = nb::cuda::device_facts();
    const bool usable = facts.why_unusable[0] == '\0';
    const nb::DeviceMemory& memory = nb::cuda::device_memory();
    return DevicePlugin{.version = DevicePlugin::kVersion,
                        .device_name = facts.name,
                        .device_bytes = facts.total_bytes,
                        .why_unusable = usable ? nullptr : facts.why_unusable,
                        .kernels = usable ? &nb::cuda::kernels(memory) : nullptr,
                        .deterministic = usable ? &nb::cuda::deterministic_kernels(memory) : nullptr};
  }();
  return &plugin;
}
