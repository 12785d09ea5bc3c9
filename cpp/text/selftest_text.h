// The text that the self-test of KV formats reads: prose, a table, source code and questions about what stood before.
//
// It is in the library so that Python and native programs measure with the same one; more than 512 tokens for every
// vocabulary we know. The engine, which knows integers, is given its tokens (engine/kv_selftest.h).
#pragma once

#include <string_view>

namespace nb::text {

/// ASCII.
std::string_view selftest_text();

}  // namespace nb::text
