#include "base/log.h"

#include <atomic>
#include <cstdio>
#include <memory>
#include <mutex>
#include <utility>

#include "base/env.h"

namespace nb {
namespace {

LogLevel initial_level() {
  const auto name = environment("NANOBRAID_LOG");
  if (!name) return LogLevel::warning;
  try {
    return parse_log_level(*name);
  } catch (const Error& error) {
    std::fprintf(stderr, "nanobraid: NANOBRAID_LOG: %s\n", error.what());
    return LogLevel::warning;
  }
}

std::atomic<LogLevel>& level_cell() {
  static std::atomic<LogLevel> level{initial_level()};
  return level;
}

struct SinkCell {
  std::mutex mutex;
  std::shared_ptr<const LogSink> sink;
};

SinkCell& sink_cell() {
  static SinkCell cell;
  return cell;
}

}  // namespace

const char* to_string(LogLevel level) {
  switch (level) {
    case LogLevel::error:
      return "error";
    case LogLevel::warning:
      return "warning";
    case LogLevel::info:
      return "info";
    case LogLevel::debug:
      return "debug";
  }
  return "error";
}

void set_log_level(LogLevel level) { level_cell().store(level, std::memory_order_relaxed); }
LogLevel log_level() { return level_cell().load(std::memory_order_relaxed); }

LogLevel parse_log_level(const std::string& name) {
  for (LogLevel level : {LogLevel::error, LogLevel::warning, LogLevel::info, LogLevel::debug}) {
    if (name == to_string(level)) return level;
  }
  fail(ErrorCode::invalid_argument, "unknown log level '", name, "': use error, warning, info or debug");
}

void set_log_sink(LogSink sink) {
  auto next = sink ? std::make_shared<const LogSink>(std::move(sink)) : nullptr;
  SinkCell& cell = sink_cell();
  const std::lock_guard lock(cell.mutex);
  cell.sink.swap(next);
}

void write_log(LogLevel level, const std::string& line) {
  std::shared_ptr<const LogSink> sink;
  {
    SinkCell& cell = sink_cell();
    const std::lock_guard lock(cell.mutex);
    sink = cell.sink;
  }
  // Called without the lock: a sink may wait for a lock (Python's) whose holder is about to log.
  if (sink) {
    (*sink)(level, line);
  } else {
    std::fprintf(stderr, "nanobraid %s: %s\n", to_string(level), line.c_str());
  }
}

}  // namespace nb
