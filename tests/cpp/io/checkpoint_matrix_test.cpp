// checkpoint_matrix.cpp: parts that fit are one matrix, parts that do not are refused by the tensor's name.
#include "io/checkpoint_matrix.h"

#include <gtest/gtest.h>

#include <cstring>
#include <limits>
#include <map>

#include "base/dtype.h"
#include "io/expect_error.h"
#include "io/safetensors_source.h"
#include "io/scratch_file.h"
#include "io/tensor_rows.h"

namespace nb::io {
namespace {

using test::expect_error;

struct Stored {
  std::string dtype, shape;
  std::vector<std::uint8_t> bytes;
};
using Parts = std::map<std::string, Stored>;

template <class T>
Stored stored(const char* dtype, const char* shape, const std::vector<T>& values) {
  Stored out{dtype, shape, std::vector<std::uint8_t>(values.size() * sizeof(T))};
  std::memcpy(out.bytes.data(), values.data(), out.bytes.size());
  return out;
}

std::string write(const test::ScratchDir& dir, const Parts& parts) {
  std::string header = "{";
  std::vector<std::uint8_t> data;
  for (const auto& [name, part] : parts) {
    header += (header.size() > 1 ? "," : "") + std::string("\"") + name + R"(":{"dtype":")" + part.dtype +
              R"(","shape":)" + part.shape + R"(,"data_offsets":[)" + std::to_string(data.size()) + "," +
              std::to_string(data.size() + part.bytes.size()) + "]}";
    data.insert(data.end(), part.bytes.begin(), part.bytes.end());
  }
  header += "}";
  std::vector<std::byte> bytes(8 + header.size() + data.size());
  const std::uint64_t length = header.size();
  std::memcpy(bytes.data(), &length, 8);
  std::memcpy(bytes.data() + 8, header.data(), header.size());
  std::memcpy(bytes.data() + 8 + header.size(), data.data(), data.size());
  return dir.write("model.safetensors", bytes);
}

// 8 rows of 64 columns in groups of 32; code of column k is k % 8, zero points 8, scales 1.
Parts gptq_parts() {
  return {{"w.qweight", stored<std::uint32_t>("I32", "[8,8]", std::vector<std::uint32_t>(64, 0x76543210u))},
          {"w.qzeros", stored<std::uint32_t>("I32", "[2,1]", {0x77777777u, 0x77777777u})},
          {"w.scales", stored<std::uint16_t>("F16", "[2,8]", std::vector<std::uint16_t>(16, 0x3c00))}};
}

Parts fp8_parts() {
  return {{"w.weight", stored<std::uint8_t>("F8_E4M3", "[2,3]", {0x38, 0xb8, 0x7e, 0x01, 0x00, 0x40})},
          {"w.weight_scale", stored<float>("F32", "[2,1]", {0.5f, 0.1f})}};
}

CheckpointMatrixName names(const std::string& scheme, std::int64_t group_size, bool has_groups = false) {
  if (scheme == "fp8") return {"m.weight", scheme, 0, {0, "w.weight"}, {0, "w.weight_scale"}, {}, {}};
  return {"m.weight",
          scheme,
          group_size,
          {0, "w.qweight"},
          {0, "w.scales"},
          {0, "w.qzeros"},
          {0, has_groups ? "w.g_idx" : ""}};
}

std::shared_ptr<const ModelSource> open(const std::string& path, const CheckpointMatrixName& matrix) {
  return open_safetensors("folder", {path}, {}, MetadataWriter(), {matrix});
}

std::vector<float> row_of(const ModelSource& source, std::int64_t row) {
  const TensorInfo& tensor = *source.find("m.weight");
  std::vector<float> out(static_cast<std::size_t>(tensor.shape[1]));
  read_rows(source, tensor, row, 1, out.data());
  return out;
}

TEST(CheckpointMatrix, IsAMatrixOfAModel) {
  const test::ScratchDir dir;
  const auto source = open(write(dir, gptq_parts()), names("gptq", 32));
  ASSERT_EQ(source->tensors().size(), 1u);
  EXPECT_EQ(source->tensors()[0].format, quant::Format::gptq_int4_g32);
  EXPECT_EQ(source->tensors()[0].shape, (std::vector<std::int64_t>{8, 64}));
  EXPECT_EQ(source->tensors()[0].bytes, 8u * 2 * 19);
  const std::vector<float> row = row_of(*source, 3);
  for (std::size_t k = 0; k < row.size(); ++k) EXPECT_EQ(row[k], static_cast<float>(k % 8) - 8.0f);
  EXPECT_EQ(row_of(*open(source->parts()[0], names("gptq_v2", 32)), 3)[1], 1.0f - 7.0f);
}

TEST(CheckpointMatrix, RowsAreReadInTheOrderOfTheInput) {
  const test::ScratchDir dir;
  Parts parts = gptq_parts();
  std::vector<std::int32_t> groups;
  for (std::int32_t k = 0; k < 64; ++k) groups.push_back(k % 2);
  parts["w.g_idx"] = stored("I32", "[64]", groups);
  std::vector<std::uint16_t> scales(16, 0x3c00);
  std::fill(scales.begin() + 8, scales.end(), std::uint16_t{0x4000});  // of group 1: 2
  parts["w.scales"] = stored("F16", "[2,8]", scales);
  const auto source = open(write(dir, parts), names("gptq", 32, true));
  ASSERT_EQ(source->tensors().size(), 2u);
  EXPECT_EQ(source->tensors()[0].name, "m.order");
  const std::vector<std::int32_t> order = read_order(*source, "m.weight", 64);
  for (std::size_t j = 0; j < 64; ++j)
    EXPECT_EQ(order[j], static_cast<std::int32_t>(j < 32 ? 2 * j : 2 * (j - 32) + 1));
  const std::vector<float> row = row_of(*source, 7);
  for (std::size_t k = 0; k < 64; ++k) {
    EXPECT_EQ(row[k], (static_cast<float>(k % 8) - 8.0f) * (k % 2 == 0 ? 1.0f : 2.0f)) << k;
  }
}

TEST(CheckpointMatrix, Fp8HasTheScaleOfItsRow) {
  const test::ScratchDir dir;
  const auto source = open(write(dir, fp8_parts()), names("fp8", 0));
  EXPECT_EQ(source->tensors()[0].format, quant::Format::fp8_e4m3);
  EXPECT_EQ(row_of(*source, 0), (std::vector<float>{0.5f, -0.5f, 224.0f}));
  EXPECT_EQ(row_of(*source, 1), (std::vector<float>{0x1p-9f * 0.1f, 0.0f, 2.0f * 0.1f}));
  Parts one = fp8_parts();
  for (const char* shape : {"[]", "[1]", "[1,1]"}) {
    one["w.weight_scale"] = stored<std::uint16_t>("BF16", shape, {0x4040});  // 3
    EXPECT_EQ(row_of(*open(write(dir, one), names("fp8", 0)), 1)[2], 6.0f) << shape;
  }
}

TEST(CheckpointMatrix, DamagedPartsAreNamed) {
  const test::ScratchDir dir;
  const auto refused = [&](const std::string& name, const Stored& part, const CheckpointMatrixName& matrix, Parts parts,
                           const char* says, ErrorCode code = ErrorCode::format) {
    if (part.dtype.empty()) {
      parts.erase(name);
    } else {
      parts[name] = part;
    }
    const std::string path = write(dir, parts);
    expect_error(
        code, [&] { static_cast<void>(row_of(*open(path, matrix), 0)); }, name, says);
  };
  const CheckpointMatrixName gptq = names("gptq", 32), ordered = names("gptq", 32, true), fp8 = names("fp8", 0);
  refused("w.qzeros", {}, gptq, gptq_parts(), "no tensor");
  refused("w.qzeros", stored<std::uint32_t>("I32", "[1,2]", {0, 0}), gptq, gptq_parts(), "[2, 1]");
  refused("w.qzeros", stored<float>("F32", "[2,1]", {0, 0}), gptq, gptq_parts(), "F32");
  refused("w.scales", stored<std::uint16_t>("F16", "[1,8]", std::vector<std::uint16_t>(8)), gptq, gptq_parts(),
          "[2, 8]");
  refused("w.scales", stored<float>("F32", "[2,8]", std::vector<float>(16, 0.1f)), gptq, gptq_parts(), "fp16");
  refused("w.scales", stored<std::uint16_t>("F16", "[2,8]", std::vector<std::uint16_t>(16, 0x7c00)), gptq, gptq_parts(),
          "not finite");
  refused("w.qweight", stored<std::uint32_t>("I32", "[7,8]", std::vector<std::uint32_t>(56)), gptq, gptq_parts(),
          "groups of 32");
  refused("w.qweight", stored<std::uint32_t>("U32", "[8,8]", std::vector<std::uint32_t>(64)), gptq, gptq_parts(),
          "U32");
  refused("w.g_idx", stored<std::int32_t>("I32", "[64]", std::vector<std::int32_t>(64, 2)), ordered, gptq_parts(),
          "group 2");
  refused("w.g_idx", stored<std::int32_t>("I32", "[64]", std::vector<std::int32_t>(64, 0)), ordered, gptq_parts(),
          "64 columns", ErrorCode::unsupported);
  refused("w.g_idx", stored<std::int32_t>("I32", "[63]", std::vector<std::int32_t>(63, 0)), ordered, gptq_parts(),
          "[64]");
  refused("w.g_idx", {}, ordered, gptq_parts(), "no tensor");
  refused("w.weight_scale", {}, fp8, fp8_parts(), "no tensor");
  refused("w.weight_scale", stored<float>("F32", "[3,1]", {1, 1, 1}), fp8, fp8_parts(), "2 rows");
  refused("w.weight_scale", stored<float>("F32", "[1]", {std::numeric_limits<float>::infinity()}), fp8, fp8_parts(),
          "not finite");
  refused("w.weight", stored<std::uint8_t>("F8_E4M3", "[2,3]", {0, 0, 0x7f, 0, 0, 0}), fp8, fp8_parts(), "NaN");
  refused("w.weight", stored<std::uint8_t>("F8_E5M2", "[2,3]", std::vector<std::uint8_t>(6)), fp8, fp8_parts(),
          "F8_E5M2");
  expect_error(
      ErrorCode::unsupported, [&] { open(write(dir, gptq_parts()), names("gptq", 16)); }, "groups of 16");
  expect_error(
      ErrorCode::invalid_argument, [&] { open(write(dir, gptq_parts()), names("marlin", 32)); }, "marlin");
}

}  // namespace
}  // namespace nb::io
