// The table of KV cache formats: what a cell of keys and one of values take.
//
// A cell holds the keys or the values of 16 tokens of one head of one layer. The order of elements inside a cell
// belongs to the backend; how numbers are rounded belongs to the format and is the same everywhere. int8 and mixed
// quantize a token when it is stored, by itself: its scales depend on no other token. Safe from any thread.
//
// f16: to nearest even; what is beyond 65504 becomes 65504 with its sign. Where a key or a value of a token and head
// has an infinity or a NaN, all of the key becomes NaN and all of the value zeros, so that who reads the token sees NaN
// and, since NaN scores of keys that are not seen are dropped, no other token does.
//
// int8: keys and values of a token and head have one scale, fp16(largest magnitude / 127) and at most 65504; a code is
// x / scale to the nearest even, within +-127. mixed: keys as int8; values in groups of 32 dimensions (the last has the
// rest) with a minimum, fp16(smallest), and a scale, fp16((largest - smallest) / 15), both within +-65504; a code is
// (x - minimum) / scale to the nearest even, within 0 and 15. Where a scale is 0 all codes are. Keys or values with an
// infinity or a NaN get a scale (in groups: a minimum) of NaN, so that who reads them sees NaN and no other token does.
//
// int4: values as mixed. Keys have a scale and a base for each dimension over the tokens of the block, and are those
// before rotation, less the bias of the projection if there is one: so they are quantized when the block is full
// (sealed), and rotated when they are read. Of a dimension whose numbers lie in [low, high], wanted = the larger of
// (high - low) / 15 and |low| / 127; unit = fp16(largest wanted of the head * 16 / 31), at most 65504; the scale is
// unit * (16 + m) / 16 * 2^(e - 15) in 4 bits m and 4 bits e, the least that is no less than wanted, or the largest.
// Base = low / scale to the nearest even, within -128 and 127; a code is key / scale to the nearest even, less the
// base, within 0 and 15. A token whose key of this head has an infinity or a NaN counts nowhere, and is marked: it is
// read as NaN.
#pragma once

#include <cstdint>
#include <string>

#include "quant/format_id.h"

namespace nb::quant {

struct KvFormatInfo {
  KvFormat format;
  const char* name;
  const char* layout;                              ///< of a block, in words; part of the identity of kept blocks
  std::int64_t (*key_cell_bytes)(int head_dim);    ///< of the keys of 16 tokens of one head
  std::int64_t (*value_cell_bytes)(int head_dim);  ///< of the values

  /// Most that the format may change what a model predicts, in the self-test of engine/kv_selftest.h: the mean KL in
  /// nats to the same model with f32 keys and values (KvSelftest::cost). 0: the format is as exact as its type, nothing
  /// is measured.
  double most_kl = 0.0;

  /// Keys and values together, scales included.
  double bits_per_element(int head_dim) const;
};

const KvFormatInfo& kv_format_info(KvFormat format);

inline const char* to_string(KvFormat format) { return kv_format_info(format).name; }

/// Throws unsupported naming `name` and the formats there are.
KvFormat parse_kv_format(const std::string& name);

}  // namespace nb::quant
