// What one member of a thread team sees during a parallel phase.
//
// Plain data without C++ library headers, so that kernels compiled for one instruction set can take it.
#pragma once

namespace nb {

/// `barrier` waits for all members; every member must call it the same number of times during a phase.
struct Part {
  int index = 0;
  int count = 1;
  void (*wait)(void* team) = nullptr;
  void* team = nullptr;

  void barrier() const {
    if (count > 1) wait(team);
  }
};

}  // namespace nb
