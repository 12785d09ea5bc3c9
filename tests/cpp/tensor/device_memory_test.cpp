#include "tensor/device_memory.h"

#include <gtest/gtest.h>

#include <utility>

#include "base/error.h"

namespace nb {
namespace {

const char* pending_error = nullptr;

// A device that has no memory left, and perhaps an error to tell.
DeviceMemory empty_device() {
  DeviceMemory memory{};
  memory.name = "cuda:0";
  memory.allocate = [](std::size_t) -> void* { return nullptr; };
  memory.free_bytes = [] { return std::size_t{77}; };
  memory.take_error = [] { return std::exchange(pending_error, nullptr); };
  return memory;
}

std::pair<ErrorCode, std::string> failure_of_allocation(const char* error) {
  pending_error = error;
  try {
    allocate_on(empty_device(), 1000);
  } catch (const Error& thrown) {
    return {thrown.code(), thrown.what()};
  }
  return {ErrorCode::internal, "nothing was thrown"};
}

TEST(DeviceMemory, TellsWhatWasAskedForAndWhatIsFree) {
  const auto [code, text] = failure_of_allocation(nullptr);
  EXPECT_EQ(code, ErrorCode::out_of_memory);
  EXPECT_NE(text.find("cannot allocate 1000 bytes; 77 are free"), std::string::npos) << text;
}

TEST(DeviceMemory, ADeviceThatFailsIsNotOutOfMemory) {
  const auto [code, text] = failure_of_allocation("an illegal address");
  EXPECT_EQ(code, ErrorCode::device);
  EXPECT_NE(text.find("cuda:0: an illegal address"), std::string::npos) << text;
}

}  // namespace
}  // namespace nb
