#include "io/gguf_parser.h"

#include <gtest/gtest.h>
#include <malloc.h>

#include <cctype>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <new>
#include <random>

#include "io/expect_error.h"
#include "io/gguf_builder.h"
#include "io/peak_memory.h"
#include "io/scratch_file.h"

// ---- how much memory a reader takes: what peak_memory.h declares, for the whole program ----

namespace nb::io::test {

std::atomic<std::size_t> live_bytes{0};
std::atomic<std::size_t> peak_bytes{0};

}  // namespace nb::io::test

using nb::io::test::live_bytes;
using nb::io::test::peak_bytes;

// Not inlined: GCC would see malloc meet delete and warn.
[[gnu::noinline]] void* operator new(std::size_t size) {
  void* memory = std::malloc(size);
  if (memory == nullptr) throw std::bad_alloc();
  const std::size_t live = live_bytes += ::malloc_usable_size(memory);
  if (live > peak_bytes) peak_bytes = live;
  return memory;
}
[[gnu::noinline]] void operator delete(void* memory) noexcept {
  if (memory != nullptr) live_bytes -= ::malloc_usable_size(memory);
  std::free(memory);
}
[[gnu::noinline]] void operator delete(void* memory, std::size_t) noexcept { operator delete(memory); }

namespace nb::io {
namespace {

using test::Bytes;
using test::expect_error;
using test::GgufBuilder;
using test::peak_of;

constexpr std::uint64_t kHuge = std::numeric_limits<std::int64_t>::max();

// Opens the bytes and looks at everything; whatever they are, this ends in a file or an Error of these kinds.
// Gives whether the file was taken.
bool survives(std::span<const std::byte> bytes) {
  try {
    const GgufFile file(bytes, "hostile");
    for (const auto& [key, value] : file.metadata().entries()) {
      EXPECT_EQ(file.metadata().find(key), &value);
      static_cast<void>(file.metadata().describe(value));
    }
    for (const GgufTensor& tensor : file.tensors()) {
      EXPECT_EQ(file.find_tensor(tensor.name), &tensor);
      EXPECT_LE(tensor.offset, bytes.size());
      EXPECT_LE(tensor.bytes, bytes.size() - tensor.offset);
    }
    return true;
  } catch (const Error& error) {
    EXPECT_TRUE(error.code() == ErrorCode::format || error.code() == ErrorCode::unsupported) << error.what();
    EXPECT_EQ(std::string(error.what()).rfind("hostile: ", 0), 0u) << error.what();
    return false;
  }
}

Bytes small_with(const std::function<void(GgufBuilder&)>& edit) {
  GgufBuilder builder;
  builder.string("first", "entry");
  edit(builder);
  return builder.build();
}

Bytes tensor_file(const test::TensorSpec& spec) {
  GgufBuilder builder;
  builder.tensor({.name = "before", .dims = {8}, .data_bytes = 32}).tensor(spec);
  Bytes bytes = builder.build();
  bytes.resize(bytes.size() + 64);
  return bytes;
}

struct HostileCase {
  const char* name;
  Bytes bytes;
  ErrorCode code;
  std::vector<const char*> message;
};

void PrintTo(const HostileCase& test, std::ostream* out) { *out << test.name; }

std::vector<HostileCase> header_cases() {
  const auto version = [](std::uint32_t number) {
    GgufBuilder builder = test::small_file();
    builder.version = number;
    return builder.build();
  };
  const auto counts = [](std::uint64_t tensors, std::uint64_t entries) {
    GgufBuilder builder = test::small_file();
    builder.num_tensors = tensors;
    builder.num_entries = entries;
    return builder.build();
  };
  const auto text = [](std::string_view content) {
    Bytes bytes;
    test::append_text(bytes, content);
    return bytes;
  };
  constexpr ErrorCode kFormat = ErrorCode::format, kUnsupported = ErrorCode::unsupported;
  return {
      {"nothing", {}, kFormat, {"the file is empty"}},
      {"one byte", text("G"), kFormat, {"offset 0", "magic needs 4 bytes", "ends after 1"}},
      {"wrong magic", text("GGML and more text here"), kFormat, {"offset 0", "not a GGUF file", "GGML"}},
      {"a page", text("<!DOCTYPE html><html>404"), kFormat, {"not a GGUF file", "<!DO"}},
      {"version 0", version(0), kUnsupported, {"offset 4", "version 0 unsupported"}},
      {"version 1", version(1), kUnsupported, {"offset 4", "version 1 unsupported"}},
      {"version 4", version(4), kUnsupported, {"version 4 unsupported"}},
      {"version 2^31", version(0x80000000u), kUnsupported, {"version 2147483648 unsupported"}},
      {"big-endian", version(0x03000000u), kUnsupported, {"big-endian"}},
      {"no counts", text({"GGUF\3\0\0\0", 8}), kFormat, {"offset 8", "tensor count needs 8 bytes"}},
      {"2^63-1 tensors", counts(kHuge, 17), kFormat, {"offset 8", "tensor count 9223372036854775807"}},
      {"2^63-1 entries", counts(5, kHuge), kFormat, {"offset 16", "metadata count 9223372036854775807"}},
      {"2^64-1 of both", counts(~0ull, ~0ull), kFormat, {"18446744073709551615"}},
      {"one entry too many", counts(5, 18), kFormat, {"at offset"}},
      {"one tensor too many", counts(6, 17), kFormat, {"tensor 5"}},
  };
}

std::vector<HostileCase> entry_cases() {
  // The first key claims `length` bytes.
  const auto key_of_length = [](std::uint64_t length) {
    Bytes bytes = small_with([](GgufBuilder&) {});
    std::memcpy(bytes.data() + 24, &length, sizeof(length));
    return bytes;
  };
  const auto string_of_length = [](std::uint64_t length) {
    return small_with([&](GgufBuilder& builder) {
      Bytes payload;
      test::append(payload, length);
      builder.raw("long", test::kString, payload);
    });
  };
  const auto array_of = [](std::uint32_t type, std::uint64_t count) {
    return small_with([&](GgufBuilder& builder) {
      Bytes payload;
      test::append(payload, type);
      test::append(payload, count);
      payload.resize(payload.size() + 32);
      builder.raw("many", test::kArray, payload);
    });
  };
  const auto alignment = [](std::uint32_t value) {
    return small_with([&](GgufBuilder& b) { b.number<std::uint32_t>("general.alignment", test::kU32, value); });
  };
  const auto with = [](const std::function<void(GgufBuilder&)>& edit) { return small_with(edit); };
  constexpr ErrorCode kFormat = ErrorCode::format;
  return {
      {"key empty", with([](GgufBuilder& b) { b.string("", "x"); }), kFormat, {"entry 1", "key is empty"}},
      {"key of 2^63", key_of_length(std::uint64_t{1} << 63), kFormat, {"offset 32", "entry 0", "9223372036854775808"}},
      {"key of 2^64-1", key_of_length(~0ull), kFormat, {"offset 32", "entry 0", "18446744073709551615"}},
      {"key twice", with([](GgufBuilder& b) { b.string("first", "again"); }), kFormat, {"\"first\" occurs twice"}},
      {"key not UTF-8", with([](GgufBuilder& b) { b.string("a\xff", "x"); }), kFormat, {"entry 1", "not UTF-8"}},
      {"key of 65536", with([](GgufBuilder& b) { b.string(std::string(65536, 'k'), "x"); }), kFormat, {"65536 bytes"}},
      {"type 13", with([](GgufBuilder& b) { b.raw("t", 13, Bytes(8)); }), kFormat, {"\"t\"", "value type 13"}},
      {"type 99", with([](GgufBuilder& b) { b.raw("t", 99, Bytes(8)); }), kFormat, {"\"t\"", "value type 99"}},
      {"type 2^32-1", with([](GgufBuilder& b) { b.raw("t", ~0u, Bytes(8)); }), kFormat, {"value type 4294967295"}},
      {"boolean 2",
       with([](GgufBuilder& b) { b.number<std::uint8_t>("b", test::kBool, 2); }),
       kFormat,
       {"\"b\"", "boolean is 2"}},
      {"boolean 255 in array",
       with([](GgufBuilder& b) {
         b.array<std::uint8_t>("b", test::kBool, {0, 1, 255});
       }),
       kFormat,
       {"\"b\"", "boolean is 255"}},
      {"string longer than the rest", string_of_length(1000), kFormat, {"\"long\"", "1000 bytes", "ends after 0"}},
      {"string of 2^63", string_of_length(std::uint64_t{1} << 63), kFormat, {"\"long\"", "9223372036854775808"}},
      {"string of 2^64-1", string_of_length(~0ull), kFormat, {"\"long\"", "18446744073709551615"}},
      {"array of arrays", array_of(test::kArray, 1), kFormat, {"\"many\"", "arrays of arrays"}},
      {"array of type 99", array_of(99, 1), kFormat, {"\"many\"", "value type 99"}},
      {"array of 2^62 u8",
       array_of(test::kU8, std::uint64_t{1} << 62),
       kFormat,
       {"\"many\"", "4611686018427387904 u8"}},
      {"array of 2^62 u32", array_of(test::kU32, std::uint64_t{1} << 62), kFormat, {"\"many\"", "u32 does not fit"}},
      {"array of 2^61 u64", array_of(test::kU64, std::uint64_t{1} << 61), kFormat, {"\"many\"", "u64 does not fit"}},
      {"array of 2^62 strings", array_of(test::kString, std::uint64_t{1} << 62), kFormat, {"\"many\"", "does not fit"}},
      {"array a little too long", array_of(test::kU8, 33), kFormat, {"33 u8", "32 bytes left"}},
      {"strings end early",
       with([](GgufBuilder& b) {
         b.strings("s", {"a", "b"}, 3);
       }),
       kFormat,
       {"\"s\""}},
      {"alignment 0", alignment(0), kFormat, {"general.alignment is 0"}},
      {"alignment 1", alignment(1), kFormat, {"general.alignment is 1"}},
      {"alignment 3", alignment(3), kFormat, {"general.alignment is 3"}},
      {"alignment 24", alignment(24), kFormat, {"general.alignment is 24"}},
      {"alignment 2^30", alignment(1u << 30), kFormat, {"general.alignment is 1073741824"}},
      {"alignment is text",
       with([](GgufBuilder& b) { b.string("general.alignment", "32"); }),
       kFormat,
       {"general.alignment", "type string", "expected u32"}},
      {"alignment is i32",
       with([](GgufBuilder& b) { b.number<std::int32_t>("general.alignment", test::kI32, 32); }),
       kFormat,
       {"general.alignment", "type i32", "expected u32"}},
  };
}

std::vector<HostileCase> tensor_cases() {
  constexpr ErrorCode kFormat = ErrorCode::format;
  constexpr std::uint64_t kBig = std::uint64_t{1} << 32;
  const std::string long_name(65, 'n');
  return {
      {"name twice",
       tensor_file({.name = "before", .dims = {8}, .data_bytes = 32}),
       kFormat,
       {"\"before\" occurs twice"}},
      {"name empty", tensor_file({.name = "", .dims = {8}, .data_bytes = 32}), kFormat, {"tensor 1", "is empty"}},
      {"name of 65",
       tensor_file({.name = long_name, .dims = {8}, .data_bytes = 32}),
       kFormat,
       {"65 bytes, more than 64"}},
      {"name not UTF-8", tensor_file({.name = "\xc3", .dims = {8}, .data_bytes = 32}), kFormat, {"not UTF-8"}},
      {"no dimensions", tensor_file({.name = "t", .dims = {}, .data_bytes = 32}), kFormat, {"\"t\"", "0 dimensions"}},
      {"5 dimensions", tensor_file({.name = "t", .dims = {1, 1, 1, 1, 1}, .data_bytes = 4}), kFormat, {"5 dimensions"}},
      {"2^32-1 dimensions",
       tensor_file({.name = "t", .dims = {1}, .data_bytes = 4, .num_dims = ~0u}),
       kFormat,
       {"4294967295 dimensions"}},
      {"dimension 0", tensor_file({.name = "t", .dims = {8, 0}, .data_bytes = 32}), kFormat, {"dimension 1 is 0"}},
      {"dimension negative",
       tensor_file({.name = "t", .dims = {~0ull}, .data_bytes = 32}),
       kFormat,
       {"dimension 0 is 18446744073709551615"}},
      {"product wraps to 0",
       tensor_file({.name = "t", .dims = {kBig, kBig}, .data_bytes = 32}),
       kFormat,
       {"dimension 1 is 4294967296: too many"}},
      {"product wraps to 8",
       tensor_file({.name = "t", .dims = {kHuge, 2, 1, 1}, .data_bytes = 32}),
       kFormat,
       {"too many"}},
      {"bytes wrap",
       tensor_file({.name = "t", .dims = {std::uint64_t{1} << 62}, .data_bytes = 32}),
       kFormat,
       {"more than the file can hold"}},
      {"rows do not fill blocks",
       tensor_file({.name = "t", .dims = {16, 2}, .type = 2, .data_bytes = 18}),
       kFormat,
       {"rows of 16 elements", "Q4_0 blocks of 32"}},
      {"larger than the file", tensor_file({.name = "t", .dims = {1000}, .data_bytes = 32}), kFormat, {"1000 blocks"}},
      {"ends beyond the file",
       tensor_file({.name = "t", .dims = {24}, .data_bytes = 0}),
       kFormat,
       {"\"t\"", "96 bytes at offset 32", "only 96"}},
      {"offset unaligned",
       tensor_file({.name = "t", .dims = {8}, .data_bytes = 32, .offset = 33}),
       kFormat,
       {"offset 33 is not a multiple of the alignment 32"}},
      {"offset beyond the file",
       tensor_file({.name = "t", .dims = {8}, .data_bytes = 32, .offset = 1 << 20}),
       kFormat,
       {"offset 1048576 of the data"}},
      {"offset wraps",
       tensor_file({.name = "t", .dims = {8}, .data_bytes = 32, .offset = ~31ull}),
       kFormat,
       {"offset 18446744073709551584"}},
      {"offset of unknown type",
       tensor_file({.name = "t", .dims = {8}, .type = 99, .data_bytes = 32, .offset = 1 << 20}),
       kFormat,
       {"offset 1048576 of the data"}},
      {"same place",
       tensor_file({.name = "t", .dims = {8}, .data_bytes = 32, .offset = 0}),
       kFormat,
       {"overlaps that of tensor"}},
      {"overlap", tensor_file({.name = "t", .dims = {1}, .data_bytes = 32, .offset = 0}), kFormat, {"overlaps"}},
  };
}

class HostileFile : public testing::TestWithParam<HostileCase> {};

TEST_P(HostileFile, IsAnErrorThatSaysWhatAndWhere) {
  const HostileCase& test = GetParam();
  try {
    const GgufFile file(test.bytes, "bad.gguf");
    ADD_FAILURE() << "the file was taken";
  } catch (const Error& error) {
    const std::string message = error.what();
    EXPECT_STREQ(to_string(error.code()), to_string(test.code)) << message;
    EXPECT_EQ(message.rfind("bad.gguf: ", 0), 0u) << message;
    for (const char* piece : test.message) {
      EXPECT_NE(message.find(piece), std::string::npos) << "missing '" << piece << "' in: " << message;
    }
  }
  EXPECT_LE(peak_of([&] { survives(test.bytes); }), test.bytes.size() + (1u << 20));
}

std::string case_name(const testing::TestParamInfo<HostileCase>& info) {
  std::string name;
  for (const char letter : std::string_view(info.param.name)) {
    name += std::isalnum(static_cast<unsigned char>(letter)) ? letter : '_';
  }
  return name;
}

INSTANTIATE_TEST_SUITE_P(Header, HostileFile, testing::ValuesIn(header_cases()), case_name);
INSTANTIATE_TEST_SUITE_P(Entry, HostileFile, testing::ValuesIn(entry_cases()), case_name);
INSTANTIATE_TEST_SUITE_P(Tensor, HostileFile, testing::ValuesIn(tensor_cases()), case_name);

TEST(GgufParser, EveryTruncationIsAnError) {
  const Bytes bytes = test::small_file().build();
  const test::ScratchDir dir;
  for (std::size_t size = 0; size < bytes.size(); ++size) {
    const Bytes cut(bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(size));  // its own memory, for ASan
    expect_error(
        ErrorCode::format, [&] { GgufFile(cut, "cut"); }, "cut: ");
    if (size % 16 == 0) {
      expect_error(
          ErrorCode::format, [&] { GgufFile{dir.write("cut.gguf", cut)}; }, "cut.gguf: ");
    }
  }
  EXPECT_TRUE(survives(bytes));
}

TEST(GgufParser, EveryByteMayBeWrong) {
  const Bytes bytes = test::small_file().build();
  std::size_t taken = 0, refused = 0;
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    for (const int value : {0x00, 0x01, 0x7f, 0x80, 0xff, -1}) {
      Bytes flipped = bytes;
      flipped[i] = value >= 0 ? static_cast<std::byte>(value) : flipped[i] ^ std::byte{1};
      bool is_taken = false;
      const std::size_t peak = peak_of([&] { is_taken = survives(flipped); });
      ASSERT_LE(peak, bytes.size() + 65536) << "byte " << i << " as " << value;
      ++(is_taken ? taken : refused);
    }
  }
  EXPECT_GT(taken, 1000u);
  EXPECT_GT(refused, 1000u);
}

TEST(GgufParser, EveryWordMayBeWrong) {
  const Bytes bytes = test::small_file().header();
  std::mt19937_64 random(7);
  for (std::size_t i = 0; i + 8 <= bytes.size(); ++i) {
    const std::uint64_t words[] = {~std::uint64_t{0}, kHuge, std::uint64_t{1} << 63, std::uint64_t{1} << 31, random()};
    for (const std::uint64_t word : words) {
      Bytes changed = test::small_file().build();
      std::memcpy(changed.data() + i, &word, sizeof(word));
      const std::size_t peak = peak_of([&] { survives(changed); });
      ASSERT_LE(peak, changed.size() + 65536) << "offset " << i << " as " << word;
    }
  }
}

// Names chosen by the file must not make looking them up slow, and directories stay in proportion to the file.
TEST(GgufParser, ManyEntriesAndTensors) {
  constexpr int kCount = 60000;
  GgufBuilder builder;
  for (int i = 0; i < kCount; ++i) builder.number<std::uint8_t>("key." + std::to_string(i), test::kU8, 1);
  for (int i = 0; i < kCount; ++i) {
    builder.tensor({.name = "tensor." + std::to_string(i), .dims = {1}, .data_bytes = 4});
  }
  const Bytes bytes = builder.build();
  const auto start = std::chrono::steady_clock::now();
  const std::size_t peak = peak_of([&] {
    const GgufFile file(bytes, "many");
    EXPECT_TRUE(file.metadata().has("key.59999"));
    EXPECT_NE(file.find_tensor("tensor.31415"), nullptr);
  });
  EXPECT_LE(peak, 2 * bytes.size() + (64u << 20));
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(10));
  for (int i = kCount; i < 70000; ++i) builder.number<std::uint8_t>("key." + std::to_string(i), test::kU8, 1);
  const Bytes more = builder.build();
  expect_error(
      ErrorCode::format, [&] { GgufFile(more, "more"); }, "metadata count 70000 is more than 65536");
}

}  // namespace
}  // namespace nb::io
