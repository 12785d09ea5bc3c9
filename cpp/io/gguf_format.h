// Which tensor types of a GGUF file the engine runs.
//
// A row is added here when quant/format.h gains a format that GGUF has too. Safe from any thread.
#pragma once

#include <cstdint>
#include <optional>

#include "quant/format_id.h"

namespace nb::io {

/// The engine's format of a GGUF tensor type; nothing if the engine does not run it.
std::optional<quant::Format> to_format(std::uint32_t gguf_type);

}  // namespace nb::io
