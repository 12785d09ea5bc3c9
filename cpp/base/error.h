// The one exception type of nanobraid and the macros that throw it.
//
// Every failure that a caller can act on is an `Error` with a code; the Python bindings and the server map the
// code, never the text. Not for control flow on a hot path. Safe to use from any thread.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

namespace nb {

/// What kind of failure happened; mapped to a Python class and to an HTTP status by one table each.
enum class ErrorCode {
  invalid_argument,  ///< the caller passed a value that is not allowed
  unsupported,       ///< a valid request for something this build or backend does not do
  format,            ///< a file does not follow its format
  io,                ///< the operating system refused a file operation
  out_of_memory,     ///< memory or KV blocks ran out
  overloaded,        ///< a queue limit is reached; retry later
  device,            ///< an accelerator failed
  internal,          ///< a broken invariant: a bug in nanobraid
};

/// The stable name of a code, e.g. "invalid_argument".
const char* to_string(ErrorCode code);

/// An error with a code and a message that says what is wrong and where.
class Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& message) : std::runtime_error(message), code_(code) {}
  ErrorCode code() const { return code_; }

 private:
  ErrorCode code_;
};

/// Joins the pieces into one string with `operator<<`.
template <class... Pieces>
std::string concat(const Pieces&... pieces) {
  std::ostringstream out;
  (out << ... << pieces);
  return out.str();
}

/// Throws `Error(code, concat(pieces...))`.
template <class... Pieces>
[[noreturn]] void fail(ErrorCode code, const Pieces&... pieces) {
  throw Error(code, concat(pieces...));
}

}  // namespace nb

/// Throws an `Error` with code `nb::ErrorCode::code_name` unless `condition` holds.
#define NB_CHECK(condition, code_name, ...)                \
  do {                                                     \
    if (!(condition)) [[unlikely]]                         \
      ::nb::fail(::nb::ErrorCode::code_name, __VA_ARGS__); \
  } while (false)

/// Checks an invariant of nanobraid itself in every build type; failing is a bug.
#define NB_ASSERT(condition) \
  NB_CHECK(condition, internal, "invariant broken: ", #condition, " at ", __FILE__, ":", __LINE__)

/// As NB_ASSERT, but only in Debug builds (for checks on hot paths).
#ifdef NDEBUG
#define NB_DEBUG_ASSERT(condition) static_cast<void>(0)
#else
#define NB_DEBUG_ASSERT(condition) NB_ASSERT(condition)
#endif
