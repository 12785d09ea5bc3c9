// Runs a function that must throw nb::Error, and gives the error.
//
// Not for death tests.
#pragma once

#include <gtest/gtest.h>

#include <initializer_list>
#include <string>

#include "base/error.h"

namespace nb::io::test {

// Fails the test unless `function` throws an Error with `code` whose message contains every one of `pieces` (at least
// one: an error that names nothing is no use).
template <class Function, class... Pieces>
void expect_error(ErrorCode code, const Function& function, const Pieces&... pieces) {
  try {
    function();
  } catch (const Error& error) {
    EXPECT_STREQ(to_string(error.code()), to_string(code)) << error.what();
    const std::string message = error.what();
    for (const std::string& piece : {std::string(pieces)...}) {
      EXPECT_NE(message.find(piece), std::string::npos) << "missing '" << piece << "' in: " << message;
    }
    return;
  }
  ADD_FAILURE() << "no error was thrown";
}

}  // namespace nb::io::test
