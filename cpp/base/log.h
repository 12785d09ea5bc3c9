// Log lines with a level, sent to one sink (stderr by default, Python's logging when the package is loaded).
//
// Not for user-facing output. Any thread may log; the sink may be called from several threads at once.
#pragma once

#include <functional>
#include <string>

#include "base/error.h"

namespace nb {

enum class LogLevel { error = 0, warning = 1, info = 2, debug = 3 };

using LogSink = std::function<void(LogLevel, const std::string&)>;

/// Lines above this level are dropped. Starts at NANOBRAID_LOG, or at `warning`.
void set_log_level(LogLevel level);
LogLevel log_level();

/// "error", "warning", "info" or "debug".
const char* to_string(LogLevel level);

/// Parses "error", "warning", "info" or "debug"; throws invalid_argument otherwise.
LogLevel parse_log_level(const std::string& name);

/// Replaces the sink; an empty function restores stderr.
void set_log_sink(LogSink sink);

/// Sends one line, unfiltered. Use the function below.
void write_log(LogLevel level, const std::string& line);

/// Sends the joined pieces if `level` is enabled.
template <class... Pieces>
void log(LogLevel level, const Pieces&... pieces) {
  if (level <= log_level()) write_log(level, concat(pieces...));
}

}  // namespace nb
