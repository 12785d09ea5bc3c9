// The only way a kernel is started: on the stream of the library, allowed to begin while the one before ends.
//
// Every kernel must call grid_wait() before its first write to global memory and before its first read of what another
// kernel wrote (weights nobody writes may be read earlier): that is what makes the early start safe.
#pragma once

#include <cstddef>

#include "cuda/device.cuh"

namespace nb::cuda {

struct LaunchShape {
  const char* name;  ///< of the kernel, for messages and for the count of what tests have run
  unsigned grid_x;
  unsigned grid_y = 1;
  unsigned grid_z = 1;
  unsigned threads = 128;
  std::size_t dynamic_shared_bytes = 0;
};

#if defined(__CUDACC__)

cudaStream_t stream();                                 // runtime.cu
void note_error(cudaError_t error, const char* what);  // runtime.cu

/// Starts a kernel: launch({.name = "gemv", .grid_x = n}, gemv<float, 1>, args).
template <class... Parameters, class... Arguments>
void launch(const LaunchShape& shape, void (*kernel)(Parameters...), Arguments&&... arguments) {
  if (shape.grid_x == 0 || shape.grid_y == 0 || shape.grid_z == 0) return;
  if (shape.dynamic_shared_bytes > (48u << 10)) {
    note_error(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(shape.dynamic_shared_bytes)),
               shape.name);
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(shape.grid_x, shape.grid_y, shape.grid_z);
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.dynamic_shared_bytes;
  config.stream = stream();
  config.attrs = &attribute;
  config.numAttrs = 1;
  note_error(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), shape.name);
}

#else

template <class... Parameters, class... Arguments>
void launch(const LaunchShape& shape, void (*kernel)(Parameters...), Arguments&&... arguments) {
  if (shape.grid_x == 0 || shape.grid_y == 0 || shape.grid_z == 0) return;
  const emulation::Launch emulated{.grid = {shape.grid_x, shape.grid_y, shape.grid_z},
                                   .block = {shape.threads, 1, 1},
                                   .dynamic_shared_bytes = shape.dynamic_shared_bytes};
  emulation::start(shape.name, emulated,
                   [kernel, ... copies = static_cast<Parameters>(arguments)] { kernel(copies...); });
}

#endif

}  // namespace nb::cuda
