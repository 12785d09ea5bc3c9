#include "base/memory_info.h"

#include <algorithm>
#include <fstream>
#include <sstream>

namespace nb {

namespace {

std::string read_text(const char* path) {
  std::ifstream file(path);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

/// The number a file consists of, or -1 if there is no file or it says "max".
std::int64_t read_number(const char* path) {
  std::ifstream file(path);
  std::int64_t value = -1;
  return file >> value ? value : -1;
}

/// Bytes left under the memory limit of the control group (version 2), or -1 without a limit. Pages of files that
/// the kernel can drop count as left.
std::int64_t group_available_bytes() {
  const std::int64_t limit = read_number("/sys/fs/cgroup/memory.max");
  const std::int64_t used = read_number("/sys/fs/cgroup/memory.current");
  if (limit < 0 || used < 0) return -1;
  std::istringstream stat(read_text("/sys/fs/cgroup/memory.stat"));
  std::int64_t droppable = 0;
  std::string key;
  std::int64_t value = 0;
  while (stat >> key >> value) {
    if (key == "inactive_file") droppable = value;
  }
  return std::max<std::int64_t>(0, limit - std::max<std::int64_t>(0, used - droppable));
}

}  // namespace

std::int64_t find_kilobyte_field(const std::string& text, const std::string& key) {
  std::istringstream lines(text);
  std::string line;
  while (std::getline(lines, line)) {
    if (line.compare(0, key.size(), key) != 0 || line.size() <= key.size() || line[key.size()] != ':') continue;
    std::istringstream rest(line.substr(key.size() + 1));
    std::int64_t kilobytes = 0;
    if (rest >> kilobytes) return kilobytes * 1024;
  }
  return -1;
}

MemoryInfo memory_info() {
  const std::string status = read_text("/proc/self/status");
  const std::string machine = read_text("/proc/meminfo");
  MemoryInfo info;
  info.rss_bytes = std::max<std::int64_t>(0, find_kilobyte_field(status, "VmRSS"));
  info.peak_rss_bytes = std::max<std::int64_t>(info.rss_bytes, find_kilobyte_field(status, "VmHWM"));
  info.available_bytes = std::max<std::int64_t>(0, find_kilobyte_field(machine, "MemAvailable"));
  const std::int64_t group = group_available_bytes();
  if (group >= 0) info.available_bytes = std::min(info.available_bytes, group);
  return info;
}

}  // namespace nb
