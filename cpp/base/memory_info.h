// What this process uses of the machine's memory, and what is left of it.
//
// Read from /proc and from the memory limit of the process's control group; not for counting our own allocations
// (tensor/allocator.h does). Safe from any thread.
#pragma once

#include <cstdint>
#include <string>

namespace nb {

struct MemoryInfo {
  std::int64_t rss_bytes = 0;        ///< resident now
  std::int64_t peak_rss_bytes = 0;   ///< highest resident so far
  std::int64_t available_bytes = 0;  ///< what may still be used without swapping or hitting the group's limit
};

/// The state now. A field is 0 where the system does not tell.
MemoryInfo memory_info();

/// The number of a line "Key:   123 kB" in bytes, or -1 if there is none (the format of /proc/meminfo and
/// /proc/self/status).
std::int64_t find_kilobyte_field(const std::string& text, const std::string& key);

}  // namespace nb
