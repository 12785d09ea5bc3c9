// Whether packed weights hold NaN or infinity, without unpacking them.
//
// For the loader, which sees every row once. Of block formats only the scales and minimums are looked at: codes are
// integers. Counting is io/weight_check.h's business. Safe from any thread.
#pragma once

#include <cstdint>

#include "quant/format_id.h"

namespace nb::quant {

/// False if a value of the row of `num_elements` weights (whole blocks) is, or unpacks to, NaN or infinity.
bool is_finite_row(Format format, const std::uint8_t* row, std::int64_t num_elements);

}  // namespace nb::quant
