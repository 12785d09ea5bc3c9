// The emulator as a library of kernels that the core opens like that of a GPU: what tests from Python run on.
#include "cuda/table.h"
#include "cuda_emulation/device.h"
#include "ops/device_plugin.h"

extern "C" __attribute__((visibility("default"))) const nb::ops::DevicePlugin* nb_device_plugin() {
  using nb::ops::DevicePlugin;
  static const DevicePlugin plugin = [] {
    const nb::DeviceMemory& memory = nb::emulation::device_memory();
    return DevicePlugin{.version = DevicePlugin::kVersion,
                        .device_name = "emulated GPU",
                        .device_bytes = memory.free_bytes(),
                        .why_unusable = nullptr,
                        .kernels = &nb::cuda::kernels(memory),
                        .deterministic = &nb::cuda::deterministic_kernels(memory)};
  }();
  return &plugin;
}
