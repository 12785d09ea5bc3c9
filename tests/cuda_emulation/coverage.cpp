// Writes which kernels a test has run into a file of its name, in the folder that NANOBRAID_EMULATED_KERNELS names, for
// tools/kernel_coverage.py. Part of every run of the emulated tests, in one process or in one for each test.
#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>

#include "base/env.h"
#include "cuda_emulation/emulator.h"

namespace nb::emulation {
namespace {

class KernelRecorder : public testing::EmptyTestEventListener {
  void OnTestStart(const testing::TestInfo&) override { take_run_kernels(); }

  void OnTestEnd(const testing::TestInfo& test) override {
    const auto folder = environment("NANOBRAID_EMULATED_KERNELS");
    if (!folder) return;
    std::string name = std::string(test.test_suite_name()) + "." + test.name();
    std::replace(name.begin(), name.end(), '/', '-');
    std::ofstream file(*folder + "/" + name + ".txt");
    for (const std::string& kernel : take_run_kernels()) file << kernel << '\n';
    file.close();
    EXPECT_TRUE(file) << "cannot write " << *folder << "/" << name << ".txt";
  }
};

// GoogleTest owns it.
const bool installed = [] {
  testing::UnitTest::GetInstance()->listeners().Append(new KernelRecorder);
  return true;
}();

}  // namespace
}  // namespace nb::emulation
