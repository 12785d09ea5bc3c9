#include "io/gguf_format.h"

namespace nb::io {

std::optional<quant::Format> to_format(std::uint32_t gguf_type) {
  switch (gguf_type) {
    case 0:
      return quant::Format::f32;
    case 1:
      return quant::Format::f16;
    case 2:
      return quant::Format::q4_0;
    case 3:
      return quant::Format::q4_1;
    case 6:
      return quant::Format::q5_0;
    case 7:
      return quant::Format::q5_1;
    case 8:
      return quant::Format::q8_0;
    case 12:
      return quant::Format::q4_k;
    case 13:
      return quant::Format::q5_k;
    case 14:
      return quant::Format::q6_k;
    case 30:
      return quant::Format::bf16;
    default:
      return std::nullopt;
  }
}

}  // namespace nb::io
