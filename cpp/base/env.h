// The only place that reads environment variables.
//
// Known names: NANOBRAID_BACKEND (forces one kernel table), NANOBRAID_CUDA_LIBRARY (the library of CUDA kernels to
// load), NANOBRAID_LOG (error|warning|info|debug).
// Not for configuration files. Read at call time; safe from any thread as long as nobody calls setenv.
#pragma once

#include <optional>
#include <string>

namespace nb {

/// The value of the variable, or nothing if it is unset or empty.
std::optional<std::string> environment(const char* name);

}  // namespace nb
