#include "io/braid_parser.h"

#include <gtest/gtest.h>

#include <cctype>
#include <chrono>
#include <functional>
#include <random>

#include "io/braid_builder.h"
#include "io/expect_error.h"
#include "io/peak_memory.h"
#include "io/scratch_file.h"

namespace nb::io {
namespace {

using test::BraidBuilder;
using test::BraidImage;
using test::Bytes;
using test::expect_error;
using test::peak_of;

constexpr std::uint64_t kHuge = std::numeric_limits<std::int64_t>::max();

// Opens the bytes and looks at everything; whatever they are, this ends in a file or an Error of these kinds.
// Gives whether the file was taken.
bool survives(std::span<const std::byte> bytes) {
  try {
    const BraidFile file(bytes, "hostile");
    for (const auto& [key, value] : file.metadata().entries()) {
      EXPECT_EQ(file.metadata().find(key), &value);
      static_cast<void>(file.metadata().describe(value));
    }
    std::uint64_t end = 0;
    for (const BraidTensor& tensor : file.tensors()) {
      EXPECT_EQ(file.find_tensor(tensor.name), &tensor);
      EXPECT_GE(tensor.offset, end);
      EXPECT_LE(tensor.offset, bytes.size());
      EXPECT_LE(tensor.bytes, bytes.size() - tensor.offset);
      end = tensor.offset + tensor.bytes;
    }
    return true;
  } catch (const Error& error) {
    EXPECT_TRUE(error.code() == ErrorCode::format || error.code() == ErrorCode::unsupported) << error.what();
    EXPECT_EQ(std::string(error.what()).rfind("hostile: ", 0), 0u) << error.what();
    return false;
  }
}

TEST(BraidParser, ReadsAValidFile) {
  const BraidImage image = test::small_braid().build();
  const BraidContents contents = parse_braid(image.bytes, "small");
  EXPECT_EQ(contents.version, 1u);
  ASSERT_EQ(contents.sections.size(), 3u);
  EXPECT_EQ(contents.sections[0].offset, image.metadata);
  EXPECT_EQ(contents.sections[1].bytes, image.tensors_bytes);
  EXPECT_EQ(contents.sections[2].offset % 4096, 0u);
  EXPECT_EQ(contents.metadata.string("general.architecture"), "llama");
  EXPECT_EQ(contents.metadata.u64("a.u32"), 4000000000u);
  ASSERT_EQ(contents.tensors.size(), 4u);
  const BraidTensor& matrix = contents.tensors[1];
  EXPECT_EQ(matrix.name, "matrix");
  EXPECT_EQ(matrix.format, 16u);
  EXPECT_EQ(matrix.dims, (std::vector<std::uint64_t>{3, 32}));
  EXPECT_EQ(matrix.offset, image.data + 4096);
  EXPECT_EQ(matrix.bytes, 54u);
  EXPECT_EQ(contents.tensors[3].format, 4u);
  EXPECT_TRUE(survives(BraidBuilder().build().bytes)) << "neither metadata nor tensors";
}

// ---- files that lie, with checksums that are right ----

struct HostileCase {
  const char* name;
  std::function<void(BraidImage&)> change;
  ErrorCode code;
  std::vector<const char*> message;
};

void PrintTo(const HostileCase& test, std::ostream* out) { *out << test.name; }

template <class T>
std::function<void(BraidImage&)> put(std::size_t offset, T value) {
  return [=](BraidImage& image) { image.put(offset, value); };
}

// Field of section entry `index`.
template <class T>
std::function<void(BraidImage&)> section(std::size_t index, std::size_t field, T value) {
  return put(BraidImage::section(index) + field, value);
}

// Bytes after the name of tensor `index`: 0 format, 4 rank, 8 dims, then offset, size, checksum.
template <class T>
std::function<void(BraidImage&)> tensor(std::size_t index, std::size_t field, T value) {
  return [=](BraidImage& image) {
    std::uint64_t length;
    std::memcpy(&length, image.bytes.data() + image.entries[index], sizeof(length));
    image.put(image.entries[index] + 8 + length + field, value);
  };
}

constexpr auto kFormat = ErrorCode::format;
constexpr auto kUnsupported = ErrorCode::unsupported;

std::vector<HostileCase> header_cases() {
  return {
      {"empty", [](BraidImage& image) { image.bytes.clear(); }, kFormat, {"the file is empty"}},
      {"one byte", [](BraidImage& image) { image.bytes.resize(1); }, kFormat, {"offset 0", "not a .braid file"}},
      {"text", [](BraidImage& image) { image.put(0, 'x'); }, kFormat, {"offset 0", "not a .braid file", "xBRAID"}},
      {"line ends", [](BraidImage& image) { image.put(6, '\n'); }, kFormat, {"offset 0", "BRAID"}},
      {"version 0", put<std::uint32_t>(8, 0), kUnsupported, {"offset 8", "version 0 unsupported"}},
      {"version 2", put<std::uint32_t>(8, 2), kUnsupported, {"offset 8", "version 2 unsupported", "reads 1"}},
      {"version 2^31", put<std::uint32_t>(8, 1u << 31), kUnsupported, {"offset 8", "big-endian"}},
      {"version 2^31+1", put<std::uint32_t>(8, (1u << 31) + 1), kUnsupported, {"version 2147483649 unsupported"}},
      {"big-endian", put<std::uint32_t>(8, 1u << 24), kUnsupported, {"offset 8", "big-endian", "version 1"}},
      {"flags", put<std::uint32_t>(12, 1), kFormat, {"offset 12", "flags are 1"}},
      {"smaller size", put<std::uint64_t>(16, 4096), kFormat, {"offset 16", "should have 4096", "too long"}},
      {"larger size", put<std::uint64_t>(16, kHuge), kFormat, {"offset 16", "incomplete"}},
      {"directory in header", put<std::uint64_t>(24, 64), kFormat, {"offset 24", "within the header"}},
      {"directory unaligned", put<std::uint64_t>(24, 129), kFormat, {"offset 24", "multiple of 8"}},
      {"directory beyond", put<std::uint64_t>(24, 1 << 20), kFormat, {"offset 24", "do not fit"}},
      {"directory wraps", put<std::uint64_t>(24, ~std::uint64_t{7}), kFormat, {"offset 24", "do not fit"}},
      {"directory elsewhere", put<std::uint64_t>(24, 136), kFormat, {"offset 136", "section directory", "checksum"}},
      {"no sections",
       [](BraidImage& image) { image.put<std::uint32_t>(32, 0).num_sections = 0; },
       kFormat,
       {"METADATA is missing"}},
      {"65 sections", put<std::uint32_t>(32, 65), kFormat, {"offset 32", "more than 64"}},
      {"2^32-1 sections", put<std::uint32_t>(32, ~0u), kFormat, {"offset 32", "more than 64"}},
      {"unused", put<std::uint8_t>(72, 1), kFormat, {"offset 72", "unused bytes"}},
      {"unused at the end", put<std::uint8_t>(123, 1), kFormat, {"offset 72", "unused bytes"}},
  };
}

std::vector<HostileCase> section_cases() {
  return {
      {"kind 0", section<std::uint32_t>(0, 0, 0), kUnsupported, {"offset 128", "unknown kind 0"}},
      {"unknown kind", section<std::uint32_t>(1, 0, 9), kUnsupported, {"offset 160", "unknown kind 9"}},
      {"needed kind made skippable",
       [](BraidImage& image) { image.put<std::uint32_t>(160, 9).put<std::uint32_t>(164, 1); },
       kFormat,
       {"TENSORS is missing"}},
      {"unknown flags", section<std::uint32_t>(0, 4, 2), kFormat, {"offset 132", "METADATA", "unknown flags 2"}},
      {"unused", section<std::uint32_t>(2, 28, 1), kFormat, {"offset 220", "DATA", "unused"}},
      {"twice", section<std::uint32_t>(1, 0, 1), kFormat, {"offset 160", "METADATA", "occurs twice"}},
      {"unaligned", section<std::uint64_t>(0, 8, 225), kFormat, {"offset 136", "METADATA", "multiple of 8"}},
      {"data unaligned", section<std::uint64_t>(2, 8, 4096 + 8), kFormat, {"offset 200", "DATA", "multiple of 4096"}},
      {"in the header", section<std::uint64_t>(0, 8, 0), kFormat, {"offset 136", "within the header"}},
      {"beyond the end", section<std::uint64_t>(2, 16, 1 << 20), kFormat, {"offset 200", "DATA", "do not fit"}},
      {"far beyond", section<std::uint64_t>(2, 8, std::uint64_t{1} << 63), kFormat, {"offset 200", "do not fit"}},
      {"size wraps",
       section<std::uint64_t>(1, 16, ~std::uint64_t{0}),
       kFormat,
       {"offset 168", "TENSORS", "do not fit"}},
      {"over the directory",
       section<std::uint64_t>(0, 8, 128),
       kFormat,
       {"METADATA", "overlaps the section directory"}},
      {"over each other",
       [](BraidImage& image) { image.put(BraidImage::section(0) + 16, std::uint64_t{2000}); },
       kFormat,
       {"TENSORS overlaps section METADATA"}},
      {"same place",
       [](BraidImage& image) { image.put(BraidImage::section(1) + 8, std::uint64_t{image.metadata}); },
       kFormat,
       {"overlaps section"}},
      {"checksum of data", section<std::uint32_t>(2, 24, 5), kFormat, {"offset 216", "DATA", "not 0"}},
  };
}

std::vector<HostileCase> metadata_cases() {
  const auto count = [](std::uint64_t value) { return [=](BraidImage& image) { image.put(image.metadata, value); }; };
  return {
      {"count 2^63-1", count(kHuge), kFormat, {"metadata count", "more than the section can hold"}},
      {"count 2^64-1", count(~std::uint64_t{0}), kFormat, {"metadata count", "can hold"}},
      {"one too many", count(5), kFormat, {"metadata entry 4", "the section ends after"}},
      {"one too few", count(3), kFormat, {"section METADATA", "bytes follow the last entry"}},
      {"key 2^63",
       [](BraidImage& image) { image.put(image.metadata + 8, std::uint64_t{1} << 63); },
       kFormat,
       {"metadata entry 0", "needs 9223372036854775808 bytes"}},
      {"empty section", section<std::uint64_t>(0, 16, 0), kFormat, {"METADATA", "checksum"}},
  };
}

std::vector<HostileCase> tensor_cases() {
  const auto count = [](std::uint64_t value) { return [=](BraidImage& image) { image.put(image.tensors, value); }; };
  const auto name = [](std::string_view text) {
    return [=](BraidImage& image) {  // over the name "matrix"
      std::memcpy(image.bytes.data() + image.entries[1] + 8, text.data(), text.size());
    };
  };
  return {
      {"count 2^63-1", count(kHuge), kFormat, {"tensor count", "more than the section can hold"}},
      {"one too many", count(5), kFormat, {"tensor 4", "the section ends after 0"}},
      {"one too few", count(3), kFormat, {"section TENSORS", "bytes follow the last entry"}},
      {"name empty",
       [](BraidImage& image) { image.put(image.entries[0], std::uint64_t{0}); },
       kFormat,
       {"tensor 0", "empty"}},
      {"name of 65 bytes",
       [](BraidImage& image) { image.put(image.entries[0], std::uint64_t{65}); },
       kFormat,
       {"tensor 0", "65 bytes, more than 64"}},
      {"name of 2^63",
       [](BraidImage& image) { image.put(image.entries[0], std::uint64_t{1} << 63); },
       kFormat,
       {"tensor 0", "the section ends"}},
      {"name not UTF-8", name("m\xff"), kFormat, {"tensor 1", "not UTF-8"}},
      {"no dimensions", tensor<std::uint32_t>(0, 4, 0), kFormat, {"\"norm\"", "0 dimensions"}},
      {"5 dimensions", tensor<std::uint32_t>(1, 4, 5), kFormat, {"\"matrix\"", "5 dimensions"}},
      {"dimension 0", tensor<std::uint64_t>(1, 8, 0), kFormat, {"\"matrix\"", "dimension 0 is 0"}},
      {"dimension negative", tensor<std::uint64_t>(1, 16, ~std::uint64_t{0}), kFormat, {"\"matrix\"", "too many"}},
      {"product wraps", tensor<std::uint64_t>(1, 8, std::uint64_t{1} << 59), kFormat, {"\"matrix\"", "too many"}},
      {"bytes wrap",
       tensor<std::uint64_t>(0, 8, std::uint64_t{1} << 60),
       kFormat,
       {"\"norm\"", "takes 4611686018427387904"}},
      {"rows not whole blocks", tensor<std::uint64_t>(1, 16, 33), kFormat, {"\"matrix\"", "q4_0 blocks of 32"}},
      {"too few bytes", tensor<std::uint64_t>(1, 32, 53), kFormat, {"\"matrix\"", "53 bytes", "takes 54"}},
      {"too many bytes", tensor<std::uint64_t>(1, 32, kHuge), kFormat, {"\"matrix\"", "takes 54"}},
      {"reserved format too long",
       tensor<std::uint64_t>(3, 32, kHuge),
       kFormat,
       {"\"later\"", "do not fit section DATA"}},
      {"offset unaligned", tensor<std::uint64_t>(1, 24, 4097), kFormat, {"\"matrix\"", "multiple of 4096"}},
      {"offset in the header", tensor<std::uint64_t>(0, 16, 0), kFormat, {"\"norm\"", "the start of section DATA"}},
      {"offset past the end",
       tensor<std::uint64_t>(3, 24, std::uint64_t{1} << 40),
       kFormat,
       {"\"later\"", "do not fit"}},
      {"offset wraps", tensor<std::uint64_t>(3, 24, ~std::uint64_t{4095}), kFormat, {"\"later\"", "do not fit"}},
      {"same place",
       [](BraidImage& image) { tensor<std::uint64_t>(1, 24, image.data)(image); },
       kFormat,
       {"\"matrix\"", "where the data of the tensor before it end"}},
      {"out of order",
       [](BraidImage& image) { tensor<std::uint64_t>(0, 16, image.data + 3 * 4096)(image); },
       kFormat,
       {"\"matrix\"", "before"}},
  };
}

class HostileBraid : public testing::TestWithParam<HostileCase> {};

TEST_P(HostileBraid, IsAnErrorThatSaysWhatAndWhere) {
  const HostileCase& test = GetParam();
  BraidImage image = test::small_braid().build();
  test.change(image);
  if (image.bytes.size() > 4096) image.seal();
  try {
    const BraidFile file(image.bytes, "bad.braid");
    ADD_FAILURE() << "the file was taken";
  } catch (const Error& error) {
    const std::string message = error.what();
    EXPECT_STREQ(to_string(error.code()), to_string(test.code)) << message;
    EXPECT_EQ(message.rfind("bad.braid: ", 0), 0u) << message;
    for (const char* piece : test.message) {
      EXPECT_NE(message.find(piece), std::string::npos) << "missing '" << piece << "' in: " << message;
    }
  }
  EXPECT_LE(peak_of([&] { survives(image.bytes); }), image.bytes.size() + (1u << 20));
}

std::string case_name(const testing::TestParamInfo<HostileCase>& info) {
  std::string name;
  for (const char letter : std::string_view(info.param.name)) {
    name += std::isalnum(static_cast<unsigned char>(letter)) ? letter : '_';
  }
  return name;
}

INSTANTIATE_TEST_SUITE_P(Header, HostileBraid, testing::ValuesIn(header_cases()), case_name);
INSTANTIATE_TEST_SUITE_P(Section, HostileBraid, testing::ValuesIn(section_cases()), case_name);
INSTANTIATE_TEST_SUITE_P(Metadata, HostileBraid, testing::ValuesIn(metadata_cases()), case_name);
INSTANTIATE_TEST_SUITE_P(Tensor, HostileBraid, testing::ValuesIn(tensor_cases()), case_name);

TEST(BraidParser, HostileEntries) {
  const auto refuse = [](const BraidBuilder& builder, const auto&... pieces) {
    const BraidImage image = builder.build();
    expect_error(
        ErrorCode::format, [&] { BraidFile(image.bytes, "bad"); }, "bad: at offset ", pieces...);
  };
  Bytes nested, endless;
  test::append(nested, static_cast<std::uint32_t>(test::kArray));
  test::append(nested, std::uint64_t{1});
  test::append(endless, static_cast<std::uint32_t>(test::kU32));
  test::append(endless, std::uint64_t{1} << 62);
  refuse(BraidBuilder().string("", "x"), "key is empty");
  refuse(BraidBuilder().string("k\xff", "x"), "not UTF-8");
  refuse(BraidBuilder().string("k", "x").string("k", "y"), "\"k\" occurs twice");
  refuse(BraidBuilder().string(std::string(65536, 'k'), "x"), "65536 bytes");
  refuse(BraidBuilder().number<std::uint32_t>("k", 99, 1), "\"k\"", "unknown value type 99");
  refuse(BraidBuilder().number<std::uint8_t>("k", test::kBool, 2), "\"k\"", "neither 0 nor 1");
  refuse(BraidBuilder().raw("k", test::kArray, nested), "\"k\"", "arrays of arrays");
  refuse(BraidBuilder().raw("k", test::kArray, endless), "\"k\"", "does not fit", "left in the section");
  refuse(BraidBuilder().number<std::uint64_t>("k", test::kString, 100), "\"k\"", "needs 100 bytes", "section ends");
  refuse(BraidBuilder().tensor({.name = "t", .dims = {1}, .bytes = 4}).tensor({.name = "t", .dims = {1}, .bytes = 4}),
         "tensor name \"t\" occurs twice");
}

TEST(BraidParser, UnknownSectionsMayBeSkippedIfTheySaySo) {
  BraidBuilder builder = test::small_braid();
  builder.spare_sections = 1;
  BraidImage image = builder.build();
  const std::size_t at = BraidImage::section(3);
  image.put<std::uint32_t>(at, 77).put<std::uint32_t>(at + 4, 1).put<std::uint64_t>(at + 8, image.data).seal();
  const BraidContents contents = parse_braid(image.bytes, "later");
  ASSERT_EQ(contents.sections.size(), 4u);
  EXPECT_EQ(contents.tensors.size(), 4u);
  image.put<std::uint32_t>(at + 4, 0).seal();
  expect_error(
      ErrorCode::unsupported, [&] { parse_braid(image.bytes, "later"); }, "unknown kind 77", "later version");
}

TEST(BraidParser, SectionsMayStandInAnyOrder) {
  BraidImage image = test::small_braid().build();
  const auto entries = image.part(BraidImage::section(0), 64);
  const Bytes both(entries.begin(), entries.end());
  std::copy(both.begin() + 32, both.end(), image.bytes.begin() + BraidImage::section(0));
  std::copy(both.begin(), both.begin() + 32, image.bytes.begin() + BraidImage::section(1));
  image.put(36, crc32c(image.part(128, 96))).put(124, crc32c(image.part(0, 124)));
  const BraidContents contents = parse_braid(image.bytes, "swapped");
  EXPECT_EQ(contents.sections[0].offset, image.metadata) << "listed by offset";
  EXPECT_EQ(contents.tensors.size(), 4u);
}

// ---- damaged files: nothing repairs the checksums ----

TEST(BraidParser, EveryTruncationIsAnError) {
  const BraidImage image = test::small_braid().build();
  const test::ScratchDir dir;
  std::vector<std::size_t> sizes;
  for (std::size_t size = 0; size <= image.data; ++size) sizes.push_back(size);
  std::mt19937_64 random(3);
  for (int i = 0; i < 50; ++i) sizes.push_back(image.data + random() % (image.bytes.size() - image.data));
  for (const std::size_t size : sizes) {
    const auto whole = image.part(0, size);
    const Bytes cut(whole.begin(), whole.end());  // its own memory, for ASan
    expect_error(
        ErrorCode::format, [&] { BraidFile(cut, "cut"); }, "cut: ", size == 0 ? "empty" : "at offset ");
    if (size % 512 == 0) {
      expect_error(
          ErrorCode::format, [&] { BraidFile{dir.write("cut.braid", cut)}; }, "cut.braid: ");
    }
  }
  Bytes longer = image.bytes;
  longer.push_back({});
  expect_error(
      ErrorCode::format, [&] { BraidFile(longer, "longer"); }, "offset 16", "too long");
}

TEST(BraidParser, EveryFlippedBitOfTheHeadIsFound) {
  const BraidImage image = test::small_braid().build();
  struct Part {
    std::size_t begin, end;
    const char* name;
  };
  const Part parts[] = {{0, 8, "not a .braid file"},
                        {8, 12, "version"},
                        {12, 128, "header"},
                        {128, 224, "section directory"},
                        {image.metadata, image.metadata + image.metadata_bytes, "section METADATA"},
                        {image.tensors, image.tensors + image.tensors_bytes, "section TENSORS"}};
  for (const Part& part : parts) {
    for (std::size_t bit = 8 * part.begin; bit < 8 * part.end; ++bit) {
      Bytes flipped = image.bytes;
      flipped[bit / 8] ^= static_cast<std::byte>(1 << bit % 8);
      try {
        const BraidFile file(flipped, "flipped");
        ADD_FAILURE() << "bit " << bit << " was not missed";
      } catch (const Error& error) {
        ASSERT_NE(std::string(error.what()).find(part.name), std::string::npos) << bit << ": " << error.what();
      }
    }
  }
}

// ---- files made by chance, with right checksums, so that the bytes behind them are reached ----

TEST(BraidParser, EveryByteAndWordMayBeWrong) {
  const BraidImage image = test::small_braid().build();
  std::mt19937_64 random(11);
  std::size_t taken = 0, refused = 0;
  const auto try_word = [&](std::size_t at, const auto value) {
    BraidImage changed = image;
    changed.put(at, value).seal();
    bool is_taken = false;
    ASSERT_LE(peak_of([&] { is_taken = survives(changed.bytes); }), image.bytes.size() + 65536) << at << " " << +value;
    ++(is_taken ? taken : refused);
  };
  for (std::size_t at = 0; at < image.tensors + image.tensors_bytes; ++at) {
    for (const int value : {0x00, 0x01, 0x7f, 0x80, 0xff}) try_word(at, static_cast<std::uint8_t>(value));
    if (at % 2 != 0) continue;
    for (const std::uint64_t word : {~std::uint64_t{0}, kHuge, std::uint64_t{1} << 63, std::uint64_t{1} << 31,
                                     std::uint64_t{4096}, std::uint64_t{random()}}) {
      try_word(at, word);
    }
  }
  EXPECT_GT(taken, 300u);
  EXPECT_GT(refused, 1000u);
}

// Directories stay in proportion to the file, and looking up names stays fast whatever they are.
TEST(BraidParser, ManyEntriesAndTensors) {
  constexpr int kCount = 5000;
  BraidBuilder builder;
  for (int i = 0; i < 60000; ++i) builder.number<std::uint8_t>("key." + std::to_string(i), test::kU8, 1);
  for (int i = 0; i < kCount; ++i) builder.tensor({.name = "tensor." + std::to_string(i), .dims = {1}, .bytes = 4});
  const BraidImage image = builder.build();
  const auto start = std::chrono::steady_clock::now();
  const std::size_t peak = peak_of([&] {
    const BraidFile file(image.bytes, "many");
    EXPECT_TRUE(file.metadata().has("key.59999"));
    EXPECT_NE(file.find_tensor("tensor.3141"), nullptr);
  });
  EXPECT_LE(peak, 2 * image.bytes.size() + (64u << 20));
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(10));
  for (int i = 60000; i < 65537; ++i) builder.number<std::uint8_t>("key." + std::to_string(i), test::kU8, 1);
  const BraidImage more = builder.build();
  expect_error(
      ErrorCode::format, [&] { BraidFile(more.bytes, "more"); }, "metadata count 65537 is more than 65536");
}

}  // namespace
}  // namespace nb::io
