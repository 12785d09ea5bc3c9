// Writes GGUF files for tests, valid ones and ones that lie: every count, length and offset can be overridden.
//
// Shares no code with the reader. Not for real models.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace nb::io::test {

using Bytes = std::vector<std::byte>;

template <class T>
void append(Bytes& out, T value) {
  const std::size_t at = out.size();
  out.resize(at + sizeof(value));
  std::memcpy(out.data() + at, &value, sizeof(value));
}

inline void append_text(Bytes& out, std::string_view text) {
  const std::size_t at = out.size();
  out.resize(at + text.size());
  if (!text.empty()) std::memcpy(out.data() + at, text.data(), text.size());
}

inline void append_string(Bytes& out, std::string_view text) {
  append(out, static_cast<std::uint64_t>(text.size()));
  append_text(out, text);
}

// Value types as numbers, so that wrong ones can be written too.
enum : std::uint32_t { kU8, kI8, kU16, kI16, kU32, kI32, kF32, kBool, kString, kArray, kU64, kI64, kF64 };

struct TensorSpec {
  std::string name;
  std::vector<std::uint64_t> dims;
  std::uint32_t type = 0;
  std::size_t data_bytes = 0;
  std::optional<std::uint64_t> offset{};    // instead of the right one
  std::optional<std::uint32_t> num_dims{};  // instead of dims.size()
};

class GgufBuilder {
 public:
  std::string magic = "GGUF";
  std::uint32_t version = 3;
  std::uint64_t alignment = 32;  // of the data; general.alignment is written only by the caller
  std::optional<std::uint64_t> num_tensors;
  std::optional<std::uint64_t> num_entries;

  // An entry from its parts; `payload` is written as it is.
  GgufBuilder& raw(std::string_view key, std::uint32_t type, const Bytes& payload) {
    append_string(entries_, key);
    append(entries_, type);
    entries_.insert(entries_.end(), payload.begin(), payload.end());
    ++entry_count_;
    return *this;
  }

  template <class T>
  GgufBuilder& number(std::string_view key, std::uint32_t type, T value) {
    Bytes payload;
    append(payload, value);
    return raw(key, type, payload);
  }

  GgufBuilder& string(std::string_view key, std::string_view text) {
    Bytes payload;
    append_string(payload, text);
    return raw(key, kString, payload);
  }

  template <class T>
  GgufBuilder& array(std::string_view key, std::uint32_t type, const std::vector<T>& values,
                     std::optional<std::uint64_t> count = std::nullopt) {
    Bytes payload;
    append(payload, type);
    append(payload, count.value_or(values.size()));
    for (const T& value : values) append(payload, value);
    return raw(key, kArray, payload);
  }

  GgufBuilder& strings(std::string_view key, const std::vector<std::string>& texts,
                       std::optional<std::uint64_t> count = std::nullopt) {
    Bytes payload;
    append(payload, static_cast<std::uint32_t>(kString));
    append(payload, count.value_or(texts.size()));
    for (const std::string& text : texts) append_string(payload, text);
    return raw(key, kArray, payload);
  }

  GgufBuilder& tensor(TensorSpec spec) {
    tensors_.push_back(std::move(spec));
    return *this;
  }

  // The header ends without padding; byte i of tensor t's data is (t * 7 + i) & 255.
  Bytes header() const {
    Bytes out;
    append_text(out, magic);
    append(out, version);
    append(out, num_tensors.value_or(tensors_.size()));
    append(out, num_entries.value_or(entry_count_));
    out.insert(out.end(), entries_.begin(), entries_.end());
    std::uint64_t offset = 0;
    for (const TensorSpec& tensor : tensors_) {
      append_string(out, tensor.name);
      append(out, tensor.num_dims.value_or(static_cast<std::uint32_t>(tensor.dims.size())));
      for (const std::uint64_t dim : tensor.dims) append(out, dim);
      append(out, tensor.type);
      append(out, tensor.offset.value_or(offset));
      offset += padded(tensor.data_bytes);
    }
    return out;
  }

  Bytes build() const {
    Bytes out = header();
    for (std::size_t t = 0; t < tensors_.size(); ++t) {
      out.resize(padded(out.size()));
      for (std::size_t i = 0; i < tensors_[t].data_bytes; ++i) out.push_back(static_cast<std::byte>(t * 7 + i));
    }
    return out;
  }

 private:
  std::size_t padded(std::size_t size) const { return (size + alignment - 1) / alignment * alignment; }

  Bytes entries_;
  std::uint64_t entry_count_ = 0;
  std::vector<TensorSpec> tensors_;
};

// A small valid file with every value type, arrays and tensors of several formats, one of them unknown.
inline GgufBuilder small_file() {
  GgufBuilder builder;
  builder.string("general.architecture", "llama")
      .number<std::uint8_t>("a.u8", kU8, 200)
      .number<std::int8_t>("a.i8", kI8, -100)
      .number<std::uint16_t>("a.u16", kU16, 60000)
      .number<std::int16_t>("a.i16", kI16, -30000)
      .number<std::uint32_t>("a.u32", kU32, 4000000000u)
      .number<std::int32_t>("a.i32", kI32, -2000000000)
      .number<float>("a.f32", kF32, 1.5f)
      .number<std::uint8_t>("a.true", kBool, 1)
      .number<std::uint8_t>("a.false", kBool, 0)
      .number<std::uint64_t>("a.u64", kU64, ~std::uint64_t{0})
      .number<std::int64_t>("a.i64", kI64, -5)
      .number<double>("a.f64", kF64, 0.25)
      .strings("a.texts", {"one", "", "three"})
      .array<std::int32_t>("a.numbers", kI32, {1, -2, 3})
      .array<float>("a.floats", kF32, {})
      .array<std::uint8_t>("a.flags", kBool, {1, 0});
  builder.tensor({.name = "norm", .dims = {8}, .type = 0, .data_bytes = 32})
      .tensor({.name = "matrix", .dims = {32, 3}, .type = 2, .data_bytes = 54})
      .tensor({.name = "k_quant", .dims = {256, 1}, .type = 11, .data_bytes = 110})
      .tensor({.name = "odd", .dims = {4, 2}, .type = 31, .data_bytes = 20})
      .tensor({.name = "cube", .dims = {2, 3, 2}, .type = 1, .data_bytes = 24});
  return builder;
}

}  // namespace nb::io::test
