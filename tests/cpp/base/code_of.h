// The code of the error a call throws; a failure of the test if it throws none.
//
// For tests only. Messages are checked by io/expect_error.h.
#pragma once

#include <gtest/gtest.h>

#include "base/error.h"

namespace nb {

template <class Function>
ErrorCode code_of(const Function& function) {
  try {
    function();
  } catch (const Error& error) {
    return error.code();
  }
  ADD_FAILURE() << "nothing was thrown";
  return ErrorCode::internal;
}

}  // namespace nb
