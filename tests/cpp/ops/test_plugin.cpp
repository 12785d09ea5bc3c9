// A library as device_loader.cpp opens them, compiled once for every way to be right or wrong (TEST_PLUGIN_<kind>).
//
// Its kernels are never called: what is tested is only whether it is accepted.
#include "ops/device_plugin.h"

using namespace nb;
using namespace nb::ops;

namespace {

KernelTable make_table() {
  KernelTable table{};
  table.name = "cuda:0";
  table.layout = WeightLayout::vectors;
  table.embed = [](const EmbedArgs&, const Part&) {};
  table.rms_norm = [](const RmsNormArgs&, const Part&) {};
  table.prepare = [](const PrepareArgs&, const Part&) {};
  table.rope = [](const RopeArgs&, const Part&) {};
  table.kv_write = [](const KvWriteArgs&, const Part&) {};
  table.silu_mul = [](const SiluMulArgs&, const Part&) {};
  table.argmax = [](const ArgmaxArgs&, const Part&) {};
#if !defined(TEST_PLUGIN_incomplete)
  table.linear = [](const LinearArgs&, const Part&) {};
  table.attention = [](const AttentionArgs&, const Part&) {};
  table.attention_scratch_bytes = [](const AttentionArgs&, int) { return int64_t{0}; };
#endif
  return table;
}

}  // namespace

#if defined(TEST_PLUGIN_without_entry)
#define ENTRY another_name
#else
#define ENTRY nb_device_plugin
#endif

extern "C" __attribute__((visibility("default"))) const DevicePlugin* ENTRY() {
  static const KernelTable table = make_table();
  static DevicePlugin plugin{.version = DevicePlugin::kVersion,
                             .device_name = "Test GPU",
                             .device_bytes = std::size_t{3} << 30,
                             .why_unusable = nullptr,
                             .kernels = &table,
                             .deterministic = &table};
#if defined(TEST_PLUGIN_unusable)
  plugin.why_unusable = "no NVIDIA driver";
  plugin.kernels = plugin.deterministic = nullptr;
  plugin.device_name = "";
#elif defined(TEST_PLUGIN_other_version)
  plugin.version += 1;
#endif
  return &plugin;
}
