// How functions that read or write whole files say how far they are.
//
// Called on the thread that does the work, after each piece of about a megabyte. What it throws ends the work and
// reaches the caller.
#pragma once

#include <cstdint>
#include <functional>

namespace nb::io {

/// Called with (bytes done, bytes in all). May be empty.
using ProgressFunction = std::function<void(std::uint64_t, std::uint64_t)>;

}  // namespace nb::io
