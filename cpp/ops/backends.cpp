#include "ops/backends.h"

#include "base/env.h"
#include "base/error.h"
#include "ops/cpu/isa/tables.h"
#include "ops/cpu/reference/reference.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace nb::ops {
namespace {

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

struct Feature {
  const char* name;
  bool (*present)();
};

const Feature kFeatures[] = {
    {"sse4.2", [] { return __builtin_cpu_supports("sse4.2") != 0; }},
    {"f16c", [] { return __builtin_cpu_supports("f16c") != 0 && state_enabled(kAvxState); }},
    {"fma", [] { return __builtin_cpu_supports("fma") != 0 && state_enabled(kAvxState); }},
    {"avx2", [] { return __builtin_cpu_supports("avx2") != 0 && state_enabled(kAvxState); }},
    {"avx512f", [] { return __builtin_cpu_supports("avx512f") != 0 && state_enabled(kAvx512State); }},
    {"avx512bw", [] { return __builtin_cpu_supports("avx512bw") != 0 && state_enabled(kAvx512State); }},
    {"avx512dq", [] { return __builtin_cpu_supports("avx512dq") != 0 && state_enabled(kAvx512State); }},
    {"avx512vl", [] { return __builtin_cpu_supports("avx512vl") != 0 && state_enabled(kAvx512State); }},
    {"avx512vnni", [] { return __builtin_cpu_supports("avx512vnni") != 0 && state_enabled(kAvx512State); }},
};

bool has(const char* name) {
  for (const Feature& feature : kFeatures) {
    if (std::string(name) == feature.name) return feature.present();
  }
  return false;
}
#endif

bool always() { return true; }

std::vector<Backend> list_backends() {
  std::vector<Backend> list = {
      {&reference_kernels(), Device{}, "nothing", always},
      {scalar_kernels(), Device{}, "nothing", always},
  };
#if defined(__x86_64__)
  list.push_back(
      {avx2_kernels(), Device{}, "avx2, fma, f16c", [] { return has("avx2") && has("fma") && has("f16c"); }});
  list.push_back({avx512_kernels(), Device{}, "avx512f, avx512bw, avx512dq, avx512vl, avx512vnni", [] {
                    return has("avx512f") && has("avx512bw") && has("avx512dq") && has("avx512vl") && has("avx512vnni");
                  }});
#endif
  return list;
}

}  // namespace

const std::vector<Backend>& compiled_backends() {
  static const std::vector<Backend> list = list_backends();
  return list;
}

std::vector<std::string> available_backends() {
  std::vector<std::string> names;
  for (const Backend& backend : compiled_backends()) {
    if (backend.usable()) names.emplace_back(backend.kernels->name);
  }
  return names;
}

const Backend& find_backend(const std::string& name) {
  std::string wanted = name == "auto" ? "" : name;
  if (wanted.empty()) wanted = environment("NANOBRAID_BACKEND").value_or("");
  const Backend* fastest = nullptr;
  std::string known;
  for (const Backend& backend : compiled_backends()) {
    if (wanted == backend.kernels->name) {
      NB_CHECK(backend.usable(), unsupported, "backend ", wanted, " needs ", backend.requires_features,
               ", which this machine does not have");
      return backend;
    }
    if (backend.usable()) fastest = &backend;
    known += (known.empty() ? "" : ", ") + std::string(backend.kernels->name);
  }
  NB_CHECK(wanted.empty(), unsupported, "unknown backend '", wanted, "': this build has ", known);
  return *fastest;
}

std::vector<std::string> cpu_features() {
  std::vector<std::string> names;
#if defined(__x86_64__)
  for (const Feature& feature : kFeatures) {
    if (feature.present()) names.emplace_back(feature.name);
  }
#endif
  return names;
}

}  // namespace nb::ops
