#include "engine/step_trace.h"

#include <cerrno>
#include <cinttypes>
#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "base/error.h"
#include "base/log.h"

namespace nb::engine {

namespace {

/// Text that may gather between two steps before it is written.
constexpr std::size_t kMostText = 64 * 1024;

/// As std::snprintf. Lines are short: names are ours, the rest are numbers.
[[gnu::format(printf, 1, 2)]] std::string format(const char* pattern, ...) {
  char line[512];
  va_list arguments;
  va_start(arguments, pattern);
  const int size = std::vsnprintf(line, sizeof(line), pattern, arguments);
  va_end(arguments);
  NB_ASSERT(size >= 0 && static_cast<std::size_t>(size) < sizeof(line));
  return {line, static_cast<std::size_t>(size)};
}

}  // namespace

StepTrace::StepTrace(const std::string& path) : path_(path), origin_(Clock::now()) {
  file_.rdbuf()->pubsetbuf(nullptr, 0);  // we write whole events; a buffer would cut them anywhere
  errno = 0;
  file_.open(path, std::ios::binary | std::ios::trunc);
  NB_CHECK(file_.is_open(), io, "trace_path: cannot write ", path, ": ", std::strerror(errno));
  before_ =
      "[\n{\"ph\":\"M\",\"name\":\"process_name\",\"pid\":1,\"tid\":1,\"args\":{\"name\":\"nanobraid\"}},\n"
      "{\"ph\":\"M\",\"name\":\"thread_name\",\"pid\":1,\"tid\":1,\"args\":{\"name\":\"steps\"}}";
  write(before_);
  NB_CHECK(file_.good(), io, "trace_path: cannot write ", path, ": ", std::strerror(errno));
}

StepTrace::~StepTrace() {
  before_ += during_ + "\n]\n";
  write(before_);
}

void StepTrace::submitted(AnswerId id, int num_prompt, Clock::time_point at) {
  async_event(before_, "b", "request", id, at, format("\"prompt_tokens\":%d", num_prompt));
  if (before_.size() > kMostText) write(before_);
}

void StepTrace::phase(const char* name, Clock::time_point begin, Clock::time_point end) {
  during_ += format(",\n{\"ph\":\"X\",\"name\":\"%s\",\"cat\":\"phase\",\"pid\":1,\"tid\":1,\"ts\":%.3f,\"dur\":%.3f}",
                    name, microseconds(begin), microseconds(end) - microseconds(begin));
}

void StepTrace::first_step(AnswerId id, Clock::time_point at) { async_event(during_, "n", "first step", id, at, ""); }

void StepTrace::first_token(AnswerId id, Clock::time_point at) { async_event(during_, "n", "first token", id, at, ""); }

void StepTrace::ended(AnswerId id, FinishReason reason, int num_generated, int num_cached, Clock::time_point at) {
  async_event(during_, "e", "request", id, at,
              format("\"finish_reason\":\"%s\",\"generated_tokens\":%d,\"cached_tokens\":%d", to_string(reason),
                     num_generated, num_cached));
}

void StepTrace::step(const StepSummary& summary, Clock::time_point begin, Clock::time_point end) {
  before_ += format(
      ",\n{\"ph\":\"X\",\"name\":\"step\",\"cat\":\"step\",\"pid\":1,\"tid\":1,\"ts\":%.3f,\"dur\":%.3f,\"args\":{"
      "\"index\":%" PRId64 ",\"rows\":%d,\"prompt_rows\":%d,\"sequences\":%d,\"preemptions\":%" PRId64
      ",\"running\":%d,\"waiting\":%d,\"failed\":%s}}",
      microseconds(begin), microseconds(end) - microseconds(begin), summary.index, summary.rows, summary.prompt_rows,
      summary.sequences, summary.preemptions, summary.running, summary.waiting, summary.failed ? "true" : "false");
  before_ += during_;
  during_.clear();
  write(before_);
}

/// Since the trace began.
double StepTrace::microseconds(Clock::time_point at) const { return 1e3 * milliseconds(at - origin_); }

void StepTrace::async_event(std::string& text, const char* kind, const char* name, AnswerId id, Clock::time_point at,
                            const std::string& arguments) {
  text += format(",\n{\"ph\":\"%s\",\"name\":\"%s\",\"cat\":\"request\",\"id\":\"%" PRIu64 ".%d\",\"pid\":1,\"tid\":1,",
                 kind, name, static_cast<std::uint64_t>(id.request), id.choice);
  text += format("\"ts\":%.3f,\"args\":{", microseconds(at)) + arguments + "}}";
}

void StepTrace::write(std::string& text) {
  if (file_.is_open()) {
    errno = 0;
    file_.write(text.data(), static_cast<std::streamsize>(text.size()));
    if (!file_.good()) {
      log(LogLevel::warning, "the trace ", path_, " ends here: ", std::strerror(errno));
      file_.close();
    }
  }
  text.clear();
}

}  // namespace nb::engine
