#include "ops/device_loader.h"

#include <dlfcn.h>
#include <link.h>

#include <filesystem>

#include "base/env.h"
#include "base/log.h"

namespace nb::ops {
namespace {

namespace fs = std::filesystem;

constexpr const char* kFileName = "libnanobraid_cuda.so";

// The folder of the file that this code was linked into; empty if the system does not tell.
fs::path own_folder() {
  static const char anchor = 0;
  Dl_info info{};
  void* extra = nullptr;
  std::error_code error;
  fs::path file;
  if (dladdr1(&anchor, &info, &extra, RTLD_DL_LINKMAP) == 0) return {};
  const char* name = static_cast<const link_map*>(extra)->l_name;
  if (name == nullptr || *name == '\0') {  // the program itself, of which dli_fname is only what it was called by
    file = fs::read_symlink("/proc/self/exe", error);
  } else {
    file = fs::absolute(name, error);
  }
  return error ? fs::path() : file.parent_path();
}

LoadedPlugin find_plugin() {
  if (const auto named = environment("NANOBRAID_CUDA_LIBRARY")) {
    LoadedPlugin loaded = load_device_plugin(*named);
    // Somebody expects it to be used; a missing GPU is another matter.
    if (loaded.plugin == nullptr) log(LogLevel::warning, "NANOBRAID_CUDA_LIBRARY: ", loaded.why_not);
    return loaded;
  }
  const fs::path folder = own_folder();
  // Beside the Python extension or a program of a build folder; or an installed program, with libraries in lib.
  for (const fs::path& path : {folder / kFileName, folder.parent_path() / "lib" / kFileName}) {
    std::error_code error;
    if (!folder.empty() && fs::exists(path, error)) return load_device_plugin(path.string());
  }
  return {nullptr, std::string("no ") + kFileName + " in " + folder.string() + ": build with NANOBRAID_CUDA=ON"};
}

}  // namespace

std::string missing_operators(const KernelTable& table) {
  std::string names;
  const auto need = [&names](bool present, const char* name) {
    if (!present) names += (names.empty() ? "" : ", ") + std::string(name);
  };
  need(table.embed != nullptr, "embed");
  need(table.rms_norm != nullptr, "rms_norm");
  need(table.prepare != nullptr, "prepare");
  need(table.linear != nullptr, "linear");
  need(table.rope != nullptr, "rope");
  need(table.kv_write != nullptr, "kv_write");
  need(table.attention != nullptr, "attention");
  need(table.attention_scratch_bytes != nullptr, "attention_scratch_bytes");
  need(table.silu_mul != nullptr, "silu_mul");
  need(table.argmax != nullptr, "argmax");
  return names;
}

LoadedPlugin load_device_plugin(const std::string& path) {
  void* const library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* error = dlerror();
    return {nullptr, "cannot open " + path + ": " + (error != nullptr ? error : "unknown error")};
  }
  const auto entry = reinterpret_cast<DevicePluginEntry>(dlsym(library, kDevicePluginSymbol));
  if (entry == nullptr) return {nullptr, path + " has no " + kDevicePluginSymbol};
  const DevicePlugin* const plugin = entry();
  if (plugin->version != DevicePlugin::kVersion) {
    return {nullptr, path + " has version " + std::to_string(plugin->version) + " of the interface, this is version " +
                         std::to_string(DevicePlugin::kVersion) + ": build both from the same sources"};
  }
  if (plugin->why_unusable != nullptr) return {plugin, plugin->why_unusable};
  for (const KernelTable* table : {plugin->kernels, plugin->deterministic}) {
    const std::string missing = missing_operators(*table);
    if (!missing.empty()) return {plugin, path + " lacks the operators " + missing};
  }
  return {plugin, ""};
}

const LoadedPlugin& device_plugin() {
  static const LoadedPlugin loaded = find_plugin();
  return loaded;
}

}  // namespace nb::ops
