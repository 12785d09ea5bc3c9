#include "model/layer_file.h"

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <string_view>
#include <system_error>

#include "base/error.h"
#include "base/log.h"
#include "base/sha256.h"
#include "model/load_progress.h"
#include "tensor/allocator.h"

namespace nb::model {
namespace {

// Everything that the bytes of the blobs follow from.
Digest identity_of(const Digest& content, ops::WeightLayout layout, std::span<const LayerWeights> layers) {
  constexpr std::string_view kTag = "nanobraid packed layers";
  Sha256 hash;
  hash.update(std::as_bytes(std::span(kTag)));
  hash.update(content);
  const auto add = [&](std::int64_t number) { hash.update(std::as_bytes(std::span(&number, 1))); };
  add(ops::kPackingVersion);
  add(static_cast<std::int64_t>(layout));
  for (const LayerWeights& layer : layers) {
    for (const auto matrix : kLayerMatrices) {
      const ops::LinearWeight& weight = layer.*matrix;
      add(weight.bytes);
      for (std::size_t i = 0; i < weight.segments.size(); ++i) {
        const ops::LinearSegment& segment = weight.segments[i];
        add(static_cast<std::int64_t>(segment.format));
        for (const std::int64_t number : {std::int64_t{segment.rows}, std::int64_t{segment.cols}, segment.strip_bytes,
                                          segment.pair_stride, weight.offsets[i]}) {
          add(number);
        }
      }
    }
  }
  return hash.finish();
}

const char* name_of(ops::WeightLayout layout) {
  switch (layout) {
    case ops::WeightLayout::rows:
      return "rows";
    case ops::WeightLayout::tile16:
      return "tile16";
    case ops::WeightLayout::vectors:
      return "vectors";
  }
  return "?";
}

// Letters, digits, points and dashes of a model's name, so many that the longest names that follow fit.
std::string file_name(const std::string& name, ops::WeightLayout layout, const Digest& identity) {
  constexpr std::size_t kMostLetters = 80;
  std::string out;
  for (const char letter : name) {
    const bool is_plain = (letter >= 'a' && letter <= 'z') || (letter >= 'A' && letter <= 'Z') ||
                          (letter >= '0' && letter <= '9') || letter == '.' || letter == '-';
    if (out.size() < kMostLetters) out += is_plain ? letter : '_';
  }
  if (out.empty() || out.front() == '.') out.insert(0, "model");
  return concat(out, "-", name_of(layout), "-", to_hex(identity).substr(0, 16), ".layers");
}

}  // namespace

std::shared_ptr<const io::BlobFile> open_layer_file(const StreamingOptions& options, const std::string& name,
                                                    ops::WeightLayout layout, std::span<const LayerWeights> layers,
                                                    const PackLayer& pack) {
  io::BlobFileSpec spec{.identity = identity_of(options.content, layout, layers)};
  for (const LayerWeights& layer : layers) spec.blob_bytes.push_back(static_cast<std::uint64_t>(blob_bytes(layer)));
  NB_CHECK(!options.cache_directory.empty(), invalid_argument, "streaming needs a cache_directory for packed layers");
  std::error_code error;
  std::filesystem::create_directories(options.cache_directory, error);
  NB_CHECK(!error, io, options.cache_directory, ": cannot create the directory: ", error.message());
  const std::string path = concat(options.cache_directory, "/", file_name(name, layout, spec.identity));
  const auto make = [&](io::BlobWriter& writer) {
    log(LogLevel::info, "packing the layers of ", name, " into ", path, ", ", spec.file_bytes(), " bytes, once");
    const std::uint64_t largest = *std::max_element(spec.blob_bytes.begin(), spec.blob_bytes.end());
    const auto arena = HostArena::create(static_cast<std::size_t>(largest));
    const Buffer memory = arena->allocate(static_cast<std::size_t>(largest));
    arena->trim();
    LoadProgress progress(name);
    std::uint64_t done = 0;
    for (std::size_t i = 0; i < layers.size(); ++i) {
      const std::span<std::byte> blob(memory.data(), static_cast<std::size_t>(spec.blob_bytes[i]));
      std::memset(blob.data(), 0, blob.size());
      pack(static_cast<int>(i), blob);
      writer.write(blob);
      done += blob.size();
      progress(static_cast<std::int64_t>(done), static_cast<std::int64_t>(spec.file_bytes()));
    }
  };
  return io::open_or_make(
      path, spec, make,
      {.bytes = static_cast<std::uint64_t>(options.cache_bytes), .name = "streaming_config.cache_bytes"});
}

void LayerReader::read(int layer, std::span<std::byte> out) {
  try {
    return file_->read(layer, out);
  } catch (const Error& error) {
    if (error.code() != ErrorCode::format && error.code() != ErrorCode::io) throw;
    std::string why_not = "it was packed again before, so the disk may be failing";
    const std::span<std::byte> blob = out.first(static_cast<std::size_t>(file_->blob_bytes(layer)));
    if (!packed_again_.contains(layer) && pack_again(layer, blob, error.what(), why_not)) return;
    file_->remove();
    fail(error.code(), error.what(), "; ", why_not,
         "; the file is removed: load the model again, which packs its layers anew, and if this repeats, give "
         "streaming_config a cache_dir on another disk");
  }
}

bool LayerReader::pack_again(int layer, std::span<std::byte> blob, const std::string& damage, std::string& why_not) {
  try {
    std::memset(blob.data(), 0, blob.size());
    pack_(layer, blob);
    file_->check(layer, blob);
  } catch (const Error& error) {
    why_not = concat("it could not be packed again: ", error.what());
    return false;
  }
  packed_again_.insert(layer);
  try {
    file_->mend(layer, blob);
    log(LogLevel::warning, damage, "; the layer was packed again from the model's file");
  } catch (const Error& error) {  // what is in memory is good
    log(LogLevel::warning, damage,
        "; the layer was packed again from the model's file, but not put back: ", error.what());
  }
  return true;
}

}  // namespace nb::model
