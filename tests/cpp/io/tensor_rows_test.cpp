#include "io/tensor_rows.h"

#include <gtest/gtest.h>

#include "io/braid_builder.h"
#include "io/braid_source.h"
#include "io/expect_error.h"

namespace nb::io {
namespace {

using test::expect_error;

class TensorRows : public testing::Test {
 protected:
  TensorRows() : image_(builder().build()), source_(open_braid(std::make_shared<const BraidFile>(image_.bytes, "m"))) {}

  static test::BraidBuilder builder() {
    test::BraidBuilder builder = test::small_braid();
    // More rows than one read takes.
    builder.tensor({.name = "tall", .format = 20, .dims = {40000, 32}, .bytes = 40000 * 34});
    return builder;
  }

  test::BraidImage image_;
  std::shared_ptr<const ModelSource> source_;
};

TEST_F(TensorRows, ShapesAsRows) {
  EXPECT_EQ(num_rows(*source_->find("norm")), 1);
  EXPECT_EQ(row_length(*source_->find("norm")), 8);
  EXPECT_EQ(num_rows(*source_->find("cube")), 6);
  EXPECT_EQ(row_length(*source_->find("cube")), 2);
}

TEST_F(TensorRows, EveryRowIsWhatItsBytesUnpackTo) {
  for (const char* name : {"norm", "matrix", "cube", "tall"}) {
    const TensorInfo& info = *source_->find(name);
    const std::int64_t rows = num_rows(info), length = row_length(info);
    std::vector<float> all(static_cast<std::size_t>(rows * length));
    read_rows(*source_, info, 0, rows, all.data());
    for (const std::int64_t row : {std::int64_t{0}, rows / 2, rows - 1}) {
      const std::int64_t row_bytes = quant::row_bytes(*info.format, length);
      std::vector<float> wanted(static_cast<std::size_t>(length)), alone(wanted.size());
      const auto* bytes = reinterpret_cast<const std::uint8_t*>(image_.bytes.data()) + info.offset + row * row_bytes;
      quant::unpack_row(*info.format, bytes, length, wanted.data());
      read_rows(*source_, info, row, 1, alone.data());
      const std::size_t size = wanted.size() * sizeof(float);  // compared as bytes: chance makes NaN too
      EXPECT_EQ(std::memcmp(alone.data(), wanted.data(), size), 0) << name << " row " << row;
      EXPECT_EQ(std::memcmp(all.data() + row * length, wanted.data(), size), 0) << name << " row " << row;
    }
  }
}

TEST_F(TensorRows, RefusesRowsThatAreNotThere) {
  const TensorInfo& matrix = *source_->find("matrix");
  float out[96];
  for (const auto& [begin, count] :
       {std::pair<std::int64_t, std::int64_t>{0, 4}, {3, 1}, {-1, 1}, {0, -1}, {4, 0}, {1, INT64_MAX}}) {
    expect_error(
        ErrorCode::invalid_argument, [&, b = begin, c = count] { read_rows(*source_, matrix, b, c, out); },
        "\"matrix\"");
  }
  read_rows(*source_, matrix, 3, 0, out);
  expect_error(
      ErrorCode::unsupported, [&] { read_rows(*source_, source_->tensors()[3], 0, 1, out); }, "\"later\"", "fp8_e5m2");
}

}  // namespace
}  // namespace nb::io
