#include "ops/device_loader.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>

#include "base/error.h"
#include "ops/backends.h"

namespace nb::ops {
namespace {

std::string library(const std::string& kind) { return TEST_PLUGIN_FOLDER "/libtest_plugin_" + kind + ".so"; }

testing::AssertionResult contains(const std::string& text, const std::string& piece) {
  if (text.find(piece) != std::string::npos) return testing::AssertionSuccess();
  return testing::AssertionFailure() << "'" << text << "' does not say '" << piece << "'";
}

TEST(DeviceLoader, AcceptsALibraryThatIsComplete) {
  const LoadedPlugin loaded = load_device_plugin(library("complete"));
  EXPECT_EQ(loaded.why_not, "");
  ASSERT_NE(loaded.plugin, nullptr);
  EXPECT_STREQ(loaded.plugin->device_name, "Test GPU");
}

TEST(DeviceLoader, SaysWhatIsWrong) {
  const LoadedPlugin unusable = load_device_plugin(library("unusable"));
  EXPECT_NE(unusable.plugin, nullptr);
  EXPECT_EQ(unusable.why_not, "no NVIDIA driver");
  EXPECT_TRUE(contains(load_device_plugin(library("incomplete")).why_not,
                       "lacks the operators linear, attention, attention_scratch_bytes"));
  const LoadedPlugin other = load_device_plugin(library("other_version"));
  EXPECT_EQ(other.plugin, nullptr);  // nothing behind the version may be read
  EXPECT_TRUE(contains(other.why_not, "has version " + std::to_string(DevicePlugin::kVersion + 1)));
  EXPECT_TRUE(contains(load_device_plugin(library("without_entry")).why_not, "has no nb_device_plugin"));
  const LoadedPlugin absent = load_device_plugin(library("absent"));
  EXPECT_EQ(absent.plugin, nullptr);
  EXPECT_TRUE(contains(absent.why_not, "cannot open " + library("absent")));
}

TEST(DeviceLoader, NamesMissingOperators) {
  KernelTable table = *find_backend("reference").kernels;
  EXPECT_EQ(missing_operators(table), "");
  table.rope = nullptr;
  table.argmax = nullptr;
  EXPECT_EQ(missing_operators(table), "rope, argmax");
}

// What is opened, and which backend is taken, is decided once in a process: these run in processes of their own.
class DeviceChoice : public testing::Test {
 protected:
  DeviceChoice() { GTEST_FLAG_SET(death_test_style, "threadsafe"); }

  ~DeviceChoice() override {
    unsetenv("NANOBRAID_CUDA_LIBRARY");
    unsetenv("NANOBRAID_BACKEND");
  }

  static void set(const std::string& cuda_library, const char* backend) {
    setenv("NANOBRAID_CUDA_LIBRARY", cuda_library.c_str(), 1);
    if (backend == nullptr) {
      unsetenv("NANOBRAID_BACKEND");
    } else {
      setenv("NANOBRAID_BACKEND", backend, 1);
    }
  }

  // Ends the process with what find_backend() gives or says.
  [[noreturn]] static void tell(const std::string& name) {
    try {
      const Backend& backend = find_backend(name);
      std::fprintf(stderr, "found %s on %s '%s'\n", backend.name.c_str(), to_string(backend.device).c_str(),
                   backend.hardware.c_str());
    } catch (const Error& error) {
      std::fprintf(stderr, "%s: %s\n", to_string(error.code()), error.what());
    }
    std::exit(0);
  }
};

// The variables are set here, in the parent: the new process looks for a device before its first test.
#define EXPECT_TOLD(cuda_library, backend, name, pattern)         \
  do {                                                            \
    set(cuda_library, backend);                                   \
    EXPECT_EXIT(tell(name), testing::ExitedWithCode(0), pattern); \
  } while (false)

TEST_F(DeviceChoice, TakesAUsableDeviceFirst) {
  EXPECT_TOLD(library("complete"), nullptr, "", "found cuda:0 on cuda:0 'Test GPU, 3.0 GiB'");
  EXPECT_TOLD(library("complete"), nullptr, "auto", "found cuda:0");
  EXPECT_TOLD(library("complete"), nullptr, "cuda", "found cuda:0");
  EXPECT_TOLD(library("complete"), "cuda:0", "", "found cuda:0");
}

TEST_F(DeviceChoice, TakesTheCpuWhereItIsAskedFor) {
  EXPECT_TOLD(library("complete"), nullptr, "cpu", "found [a-z0-9_]+ on cpu ''");
  EXPECT_TOLD(library("complete"), "scalar", "", "found scalar on cpu");
  EXPECT_TOLD(library("complete"), "scalar", "cpu", "found scalar on cpu");
  EXPECT_TOLD(library("complete"), nullptr, "reference", "found reference on cpu");
  EXPECT_TOLD(library("complete"), "cuda:0", "cpu",
              "unsupported: the CPU was asked for, but NANOBRAID_BACKEND is cuda:0");
}

TEST_F(DeviceChoice, GoesOnWithoutADeviceButNeverFallsBackFromOne) {
  EXPECT_TOLD(library("unusable"), nullptr, "", "found [a-z0-9_]+ on cpu");
  EXPECT_TOLD(library("unusable"), nullptr, "cuda:0", "unsupported: backend cuda:0 cannot run here: no NVIDIA driver");
  EXPECT_TOLD(library("unusable"), "cuda:0", "", "unsupported: backend cuda:0 cannot run here: no NVIDIA driver");
  EXPECT_TOLD(library("incomplete"), nullptr, "cuda:0", "lacks the operators linear, attention");
  EXPECT_TOLD(library("absent"), nullptr, "", "NANOBRAID_CUDA_LIBRARY: cannot open .*\n.*found [a-z0-9_]+ on cpu");
  EXPECT_TOLD(library("complete"), nullptr, "riscv", "unknown backend 'riscv': this build has reference, .*cuda:0");
}

}  // namespace
}  // namespace nb::ops
