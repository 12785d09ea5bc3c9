// A folder with one file of blobs, and what must be in it.
//
// For the tests of blob_file.cpp and blob_cache.cpp.
#pragma once

#include <gtest/gtest.h>

#include <atomic>
#include <cstddef>
#include <fstream>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "io/blob_cache.h"
#include "io/scratch_file.h"
#include "tensor/allocator.h"

namespace nb::io::test {

using Blob = std::vector<std::byte>;

inline std::vector<Blob> random_blobs() {
  std::mt19937 random(7);
  std::vector<Blob> blobs;
  for (const std::size_t bytes : {5u, 4096u, 3u << 20, 4097u, 1u, 12'345u, (21u << 20) + 17}) {
    Blob& blob = blobs.emplace_back(bytes);
    for (std::byte& byte : blob) byte = static_cast<std::byte>(random());
  }
  return blobs;
}

inline BlobFileSpec spec_of(const std::vector<Blob>& blobs, int identity = 1) {
  BlobFileSpec spec;
  spec.identity[31] = static_cast<std::byte>(identity);
  for (const Blob& blob : blobs) spec.blob_bytes.push_back(blob.size());
  return spec;
}

inline Blob read(const BlobFile& file, int index, std::size_t bytes) {
  const auto arena = HostArena::create(1);
  const Buffer memory = arena->allocate(static_cast<std::size_t>(blob_room(bytes)), kBlobAlignment);
  file.read(index, {memory.data(), memory.bytes()});
  return {memory.data(), memory.data() + bytes};
}

class BlobFolder : public testing::Test {
 protected:
  // Opens the file, and counts how often it had to be made.
  std::shared_ptr<const BlobFile> open(int identity = 1, const BlobLimit& limit = {}) {
    const auto make = [&](BlobWriter& writer) {
      ++num_made_;
      for (const Blob& blob : blobs_) writer.write(blob);
    };
    return open_or_make(path_, spec_of(blobs_, identity), make, limit);
  }

  void expect_good(const BlobFile& file) const {
    for (std::size_t i = blobs_.size(); i-- > 0;) {
      EXPECT_EQ(read(file, static_cast<int>(i), blobs_[i].size()), blobs_[i]) << i;
    }
  }

  void change(std::uint64_t offset, char value) const {
    std::fstream file(path_, std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(static_cast<std::streamoff>(offset));
    file.put(value);
  }

  ScratchDir dir_;
  std::string path_ = dir_.path("a.blobs");
  std::vector<Blob> blobs_ = random_blobs();
  std::atomic<int> num_made_ = 0;
};

}  // namespace nb::io::test
