#include "io/checkpoint_matrix.h"

#include <cmath>
#include <cstring>
#include <utility>

#include "base/dtype.h"
#include "base/error.h"
#include "quant/checkpoint.h"
#include "text/unicode.h"

namespace nb::io {
namespace {

struct Int4Scheme {
  const char* name;
  quant::Int4Packing packing;
  quant::ZeroRule zero_rule;
};

constexpr Int4Scheme kInt4Schemes[] = {
    {"awq", quant::Int4Packing::awq, quant::ZeroRule::stored},
    {"gptq", quant::Int4Packing::gptq, quant::ZeroRule::next},
    {"gptq_carried", quant::Int4Packing::gptq, quant::ZeroRule::carried},
    {"gptq_v2", quant::Int4Packing::gptq, quant::ZeroRule::stored},
};

const Int4Scheme* find_scheme(const std::string& name) {
  for (const Int4Scheme& scheme : kInt4Schemes) {
    if (name == scheme.name) return &scheme;
  }
  return nullptr;
}

quant::Format int4_format(quant::Int4Packing packing, std::int64_t group_size) {
  const bool is_awq = packing == quant::Int4Packing::awq;
  if (group_size == 128) return is_awq ? quant::Format::awq_int4 : quant::Format::gptq_int4;
  if (group_size == 64) return is_awq ? quant::Format::awq_int4_g64 : quant::Format::gptq_int4_g64;
  NB_CHECK(group_size == 32, unsupported, "groups of ", group_size,
           " columns are not offered; there are 32, 64 and 128");
  return is_awq ? quant::Format::awq_int4_g32 : quant::Format::gptq_int4_g32;
}

std::string shape_text(const std::vector<std::int64_t>& shape) {
  std::string out = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) out += (i > 0 ? ", " : "") + std::to_string(shape[i]);
  return out + "]";
}

// Files are little-endian, as the machines are that this runs on.
template <class T>
std::vector<T> numbers(const std::vector<std::byte>& bytes) {
  std::vector<T> out(bytes.size() / sizeof(T));
  std::memcpy(out.data(), bytes.data(), out.size() * sizeof(T));
  return out;
}

}  // namespace

CheckpointMatrix::CheckpointMatrix(const std::vector<std::unique_ptr<const SafetensorsFile>>& files,
                                   CheckpointMatrixName names)
    : files_(files), names_(std::move(names)) {
  if (find_scheme(names_.scheme) != nullptr) {
    open_int4();
  } else {
    NB_CHECK(names_.scheme == "fp8", invalid_argument, "there is no scheme ", text::in_quotes(names_.scheme),
             " of quantized checkpoints");
    open_fp8();
  }
}

const SafetensorsTensor* CheckpointMatrix::find(const CheckpointPart& part, const char* what) const {
  NB_CHECK(!part.stored_name.empty(), format, "matrix ", names_.name, " has no ", what);
  NB_CHECK(part.file < files_.size(), invalid_argument, "there is no safetensors file ", part.file);
  const SafetensorsTensor* tensor = files_[part.file]->find(part.stored_name);
  NB_CHECK(tensor != nullptr, format, files_[part.file]->path(), ": there is no tensor ",
           text::in_quotes(part.stored_name));
  return tensor;
}

void CheckpointMatrix::refuse(const CheckpointPart& part, const std::string& why) const {
  fail(ErrorCode::format, files_[part.file]->path(), ": tensor ", text::in_quotes(part.stored_name), " ", why);
}

// `dtype` empty: any floats that scales come in.
void CheckpointMatrix::expect(const CheckpointPart& part, const char* what, const std::string& dtype,
                              const std::vector<std::int64_t>& shape) const {
  const SafetensorsTensor& tensor = *find(part, what);
  const bool fits = dtype.empty() ? tensor.format.has_value() : tensor.dtype == dtype;
  if (!fits) refuse(part, "has dtype " + tensor.dtype + ", expected " + (dtype.empty() ? "F16, BF16 or F32" : dtype));
  if (tensor.shape != shape) {
    refuse(part, "has shape " + shape_text(tensor.shape) + ", expected " + shape_text(shape));
  }
}

void CheckpointMatrix::open_int4() {
  const Int4Scheme& scheme = *find_scheme(names_.scheme);
  const bool is_awq = scheme.packing == quant::Int4Packing::awq;
  format_ = int4_format(scheme.packing, names_.group_size);
  const SafetensorsTensor& codes = *find(names_.codes, "qweight");
  if (codes.dtype != "I32" || codes.shape.size() != 2) {
    refuse(names_.codes,
           "has dtype " + codes.dtype + " and shape " + shape_text(codes.shape) + ", expected a matrix of I32");
  }
  cols_ = is_awq ? codes.shape[0] : codes.shape[0] * 8;
  rows_ = is_awq ? codes.shape[1] * 8 : codes.shape[1];
  if (rows_ == 0 || cols_ == 0 || rows_ % 8 != 0 || cols_ % names_.group_size != 0) {
    refuse(names_.codes, "holds " + std::to_string(rows_) + " rows of " + std::to_string(cols_) +
                             " columns, which do not fill words of 8 rows and groups of " +
                             std::to_string(names_.group_size) + " columns");
  }
  const std::int64_t num_groups = cols_ / names_.group_size;
  expect(names_.zeros, "qzeros", "I32", {num_groups, rows_ / 8});
  expect(names_.scales, "scales", "", {num_groups, rows_});
  if (names_.groups.stored_name.empty()) return;
  expect(names_.groups, "g_idx", "I32", {cols_});
  const std::vector<std::int32_t> groups = numbers<std::int32_t>(read_part(names_.groups));
  try {
    order_ = quant::order_of_groups(groups, names_.group_size);
  } catch (const Error& error) {
    fail(error.code(), files_[names_.groups.file]->path(), ": tensor ", text::in_quotes(names_.groups.stored_name),
         ": ", error.what());
  }
}

void CheckpointMatrix::open_fp8() {
  format_ = quant::Format::fp8_e4m3;
  const SafetensorsTensor& codes = *find(names_.codes, "weight");
  if (codes.dtype != "F8_E4M3" || codes.shape.size() != 2 || codes.bytes == 0) {
    refuse(names_.codes,
           "has dtype " + codes.dtype + " and shape " + shape_text(codes.shape) + ", expected a matrix of F8_E4M3");
  }
  rows_ = codes.shape[0];
  cols_ = codes.shape[1];
  // One for all, or one for each row.
  const SafetensorsTensor& scales = *find(names_.scales, "weight_scale");
  const std::vector<std::int64_t>& shape = scales.shape;
  const bool is_one = shape.empty() || shape == std::vector<std::int64_t>{1};
  const bool is_column =
      !shape.empty() && shape[0] == rows_ && (shape.size() == 1 || (shape.size() == 2 && shape[1] == 1));
  if (!is_one && !is_column && shape != std::vector<std::int64_t>{1, 1}) {
    refuse(names_.scales, "has shape " + shape_text(shape) + ", expected one scale or one for each of " +
                              std::to_string(rows_) + " rows");
  }
  expect(names_.scales, "weight_scale", "", shape);
}

std::vector<std::byte> CheckpointMatrix::read_part(const CheckpointPart& part) const {
  const SafetensorsTensor& tensor = *find(part, "part");
  std::vector<std::byte> bytes(static_cast<std::size_t>(tensor.bytes));
  files_[part.file]->read(tensor.offset, bytes);
  return bytes;
}

std::vector<float> CheckpointMatrix::read_scales() const {
  const std::vector<std::byte> bytes = read_part(names_.scales);
  const quant::Format stored = *find(names_.scales, "scales")->format;
  std::vector<float> scales(bytes.size() / (stored == quant::Format::f32 ? 4 : 2));
  quant::unpack_row(stored, reinterpret_cast<const std::uint8_t*>(bytes.data()),
                    static_cast<std::int64_t>(scales.size()), scales.data());
  for (const float scale : scales) {
    if (!std::isfinite(scale)) refuse(names_.scales, "holds a scale that is not finite");
  }
  return scales;
}

std::vector<std::byte> CheckpointMatrix::read() const {
  return format_ == quant::Format::fp8_e4m3 ? read_fp8() : read_int4();
}

std::vector<std::byte> CheckpointMatrix::read_int4() const {
  const Int4Scheme& scheme = *find_scheme(names_.scheme);
  const std::vector<std::uint32_t> codes = numbers<std::uint32_t>(read_part(names_.codes));
  const std::vector<std::uint32_t> zeros = numbers<std::uint32_t>(read_part(names_.zeros));
  std::vector<std::uint16_t> halves;
  for (const float scale : read_scales()) {
    halves.push_back(f32_to_f16(scale));
    if (f16_to_f32(halves.back()) != scale) {
      refuse(names_.scales, "holds the scale " + std::to_string(scale) + ", which fp16 does not hold exactly");
    }
  }
  std::vector<std::byte> out(static_cast<std::size_t>(rows_ * quant::row_bytes(format_, cols_)));
  quant::repack_int4({scheme.packing, scheme.zero_rule, rows_, cols_, names_.group_size, codes, zeros, halves, order_},
                     format_, reinterpret_cast<std::uint8_t*>(out.data()));
  return out;
}

std::vector<std::byte> CheckpointMatrix::read_fp8() const {
  const std::vector<std::byte> codes = read_part(names_.codes);
  for (const std::byte code : codes) {
    if ((code & std::byte{0x7f}) == std::byte{0x7f}) refuse(names_.codes, "holds NaN");
  }
  const std::vector<float> scales = read_scales();
  std::vector<std::byte> out(static_cast<std::size_t>(rows_ * quant::row_bytes(format_, cols_)));
  std::byte* to = out.data();
  for (std::int64_t row = 0; row < rows_; ++row, to += sizeof(float) + static_cast<std::size_t>(cols_)) {
    std::memcpy(to, &scales[scales.size() == 1 ? 0 : static_cast<std::size_t>(row)], sizeof(float));
    std::memcpy(to + sizeof(float), codes.data() + row * cols_, static_cast<std::size_t>(cols_));
  }
  return out;
}

}  // namespace nb::io
