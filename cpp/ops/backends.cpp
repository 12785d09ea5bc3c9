#include "ops/backends.h"

#include <algorithm>
#include <iomanip>
#include <sstream>

#include "base/env.h"
#include "base/error.h"
#include "ops/cpu/isa/tables.h"
#include "ops/cpu/reference/reference.h"
#include "ops/device_loader.h"
#include "ops/ops.h"
#include "quant/kv_format.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace nb::ops {
namespace {

struct Feature {
  const char* name;
  bool (*present)();
};

#if defined(__x86_64__)
// Register bits the system saves and restores: without this the instructions fault although CPUID names them.
unsigned long long enabled_state() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || (ecx & bit_OSXSAVE) == 0) return 0;
  unsigned low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<unsigned long long>(high) << 32 | low;
}

bool state_enabled(unsigned long long mask) { return (enabled_state() & mask) == mask; }

constexpr unsigned long long kAvxState = 0x6;      // XMM, YMM
constexpr unsigned long long kAvx512State = 0xe6;  // and opmask, ZMM

// CPUID leaf 7, subleaf 1, EAX bit 4; not every compiler we build with knows the name for __builtin_cpu_supports.
bool names_avxvnni() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  const bool has_subleaf = __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && eax >= 1;
  return has_subleaf && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & 1u << 4) != 0;
}

const Feature kFeatures[] = {
    {"sse4.2", [] { return __builtin_cpu_supports("sse4.2") != 0; }},
    {"f16c", [] { return __builtin_cpu_supports("f16c") != 0 && state_enabled(kAvxState); }},
    {"fma", [] { return __builtin_cpu_supports("fma") != 0 && state_enabled(kAvxState); }},
    {"avx2", [] { return __builtin_cpu_supports("avx2") != 0 && state_enabled(kAvxState); }},
    {"avxvnni", [] { return names_avxvnni() && state_enabled(kAvxState); }},
    {"avx512f", [] { return __builtin_cpu_supports("avx512f") != 0 && state_enabled(kAvx512State); }},
    {"avx512bw", [] { return __builtin_cpu_supports("avx512bw") != 0 && state_enabled(kAvx512State); }},
    {"avx512dq", [] { return __builtin_cpu_supports("avx512dq") != 0 && state_enabled(kAvx512State); }},
    {"avx512vl", [] { return __builtin_cpu_supports("avx512vl") != 0 && state_enabled(kAvx512State); }},
    {"avx512vnni", [] { return __builtin_cpu_supports("avx512vnni") != 0 && state_enabled(kAvx512State); }},
    {"avx512bf16", [] { return __builtin_cpu_supports("avx512bf16") != 0 && state_enabled(kAvx512State); }},
};

#elif defined(__aarch64__)
const Feature kFeatures[] = {
    {"neon", [] { return (getauxval(AT_HWCAP) & HWCAP_ASIMD) != 0; }},
    {"dotprod", [] { return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0; }},
    {"i8mm", [] { return (getauxval(AT_HWCAP2) & HWCAP2_I8MM) != 0; }},
};
#endif

#if defined(__x86_64__) || defined(__aarch64__)
bool has(const char* name) {
  for (const Feature& feature : kFeatures) {
    if (std::string(name) == feature.name) return feature.present();
  }
  return false;
}
#endif

// A table of the CPU; `features` is what the processor must have.
Backend host_backend(const KernelTable* kernels, bool usable = true, const char* features = "") {
  return {.name = kernels->name,
          .kernels = kernels,
          .deterministic = kernels,
          .device = {},
          .hardware = "",
          .why_not = usable ? "" : std::string("this machine does not have ") + features};
}

// Of the CPU only, so that whoever names one of them wakes no driver.
const std::vector<Backend>& host_backends() {
  static const std::vector<Backend> list = [] {
    std::vector<Backend> tables = {host_backend(&reference_kernels()), host_backend(scalar_kernels())};
    // A build may leave tables out (NANOBRAID_KERNELS).
#if defined(__x86_64__)
    [[maybe_unused]] const bool has_avx2 = has("avx2") && has("fma") && has("f16c");
    [[maybe_unused]] const bool has_avx512 =
        has("avx512f") && has("avx512bw") && has("avx512dq") && has("avx512vl") && has("avx512vnni");
#endif
#if defined(NB_KERNELS_AVX2)
    tables.push_back(host_backend(avx2_kernels(), has_avx2, "avx2, fma, f16c"));
#endif
#if defined(NB_KERNELS_AVXVNNI)
    tables.push_back(host_backend(avxvnni_kernels(), has_avx2 && has("avxvnni"), "avx2, fma, f16c, avxvnni"));
#endif
#if defined(NB_KERNELS_AVX512)
    tables.push_back(host_backend(avx512_kernels(), has_avx512, "avx512f, avx512bw, avx512dq, avx512vl, avx512vnni"));
#endif
#if defined(NB_KERNELS_AVX512BF16)
    tables.push_back(host_backend(avx512bf16_kernels(), has_avx512 && has("avx512bf16"),
                                  "avx512f, avx512bw, avx512dq, avx512vl, avx512vnni, avx512bf16"));
#endif
#if defined(NB_KERNELS_NEON)
    tables.push_back(host_backend(neon_kernels(), has("neon"), "neon"));
#endif
#if defined(NB_KERNELS_NEON_DOTPROD)
    tables.push_back(host_backend(neon_dotprod_kernels(), has("neon") && has("dotprod"), "neon, dotprod"));
#endif
#if defined(NB_KERNELS_NEON_I8MM)
    tables.push_back(host_backend(neon_i8mm_kernels(), has("neon") && has("i8mm"), "neon, i8mm"));
#endif
    return tables;
  }();
  return list;
}

Backend cuda_backend() {
  const LoadedPlugin& loaded = device_plugin();
  Backend backend{.name = "cuda:0",
                  .kernels = nullptr,
                  .deterministic = nullptr,
                  .device = {DeviceKind::cuda, 0},
                  .hardware = "",
                  .why_not = loaded.why_not};
  if (loaded.plugin == nullptr) return backend;
  if (loaded.plugin->device_name[0] != '\0') {
    std::ostringstream hardware;
    hardware << loaded.plugin->device_name << ", " << std::fixed << std::setprecision(1)
             << static_cast<double>(loaded.plugin->device_bytes) / (1 << 30) << " GiB";
    backend.hardware = hardware.str();
  }
  if (!backend.usable()) return backend;
  backend.kernels = loaded.plugin->kernels;
  backend.deterministic = loaded.plugin->deterministic;
  return backend;
}

const Backend* find(const std::vector<Backend>& list, const std::string& name) {
  const auto found = std::find_if(list.begin(), list.end(), [&](const Backend& b) { return b.name == name; });
  return found == list.end() ? nullptr : &*found;
}

const Backend& fastest(const std::vector<Backend>& list) {
  return *std::find_if(list.rbegin(), list.rend(), [](const Backend& b) { return b.usable(); });
}

}  // namespace

const std::vector<Backend>& compiled_backends() {
  static const std::vector<Backend> list = [] {
    std::vector<Backend> all = host_backends();
    all.push_back(cuda_backend());
    return all;
  }();
  return list;
}

std::vector<std::string> available_backends() {
  std::vector<std::string> names;
  for (const Backend& backend : compiled_backends()) {
    if (backend.usable()) names.push_back(backend.name);
  }
  return names;
}

const Backend& find_backend(const std::string& name) {
  const std::string forced = environment("NANOBRAID_BACKEND").value_or("");
  const bool any = name.empty() || name == "auto";
  std::string wanted = (any || name == "cpu") && !forced.empty() ? forced : name;
  if (wanted == "cuda") wanted = "cuda:0";
  if (wanted == "cpu") return fastest(host_backends());
  const Backend* backend = find(host_backends(), wanted);
  NB_CHECK(backend != nullptr || name != "cpu", unsupported, "the CPU was asked for, but NANOBRAID_BACKEND is ",
           forced);
  if (backend == nullptr && (wanted.empty() || wanted == "auto")) return fastest(compiled_backends());
  if (backend == nullptr) backend = find(compiled_backends(), wanted);
  if (backend == nullptr) {
    std::string known;
    for (const Backend& one : compiled_backends()) known += (known.empty() ? "" : ", ") + one.name;
    fail(ErrorCode::unsupported, "unknown backend '", wanted, "': this build has ", known);
  }
  NB_CHECK(backend->usable(), unsupported, "backend ", wanted, " cannot run here: ", backend->why_not);
  return *backend;
}

std::vector<std::string> cpu_features() {
  std::vector<std::string> names;
#if defined(__x86_64__) || defined(__aarch64__)
  for (const Feature& feature : kFeatures) {
    if (feature.present()) names.emplace_back(feature.name);
  }
#endif
  return names;
}

void require_kv_format(const KernelTable& kernels, quant::KvFormat format) {
  if ((kernels.kv_formats & kv_bit(format)) != 0) return;
  std::string offered;
  for (int i = 0; i < quant::kNumKvFormats; ++i) {
    const auto other = static_cast<quant::KvFormat>(i);
    if ((kernels.kv_formats & kv_bit(other)) == 0) continue;
    offered += (offered.empty() ? "" : ", ") + std::string(quant::to_string(other));
  }
  fail(ErrorCode::unsupported, "KV format ", quant::to_string(format), " is not offered by backend ", kernels.name,
       ", which has: ", offered);
}

void require_key_policies(const KernelTable& kernels) {
  NB_CHECK(kernels.key_policies, unsupported, "KV policies are not offered by backend ", kernels.name);
}

}  // namespace nb::ops
