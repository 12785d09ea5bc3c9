// Files of blobs in a folder: made when they are wanted for the first time, and removed when others need their room.
//
// A limit holds for all files of one kind (one ending) in the folder. The one that was opened longest ago goes first;
// one that is open, in whatever process, never goes. Safe from several threads and processes where the file system has
// locks (flock); without, two may make the same file at once, and nothing is removed.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "io/blob_file.h"

namespace nb::io {

struct BlobLimit {
  std::uint64_t bytes = 0;  ///< of all files of the kind in the folder; 0: no limit
  std::string name{};       ///< of the option that says so, for messages
};

/// Opens a file, which `make` fills first if there is none or a wrong one. Of several processes and threads that want
/// it at once, one makes it and the others wait. Throws what opening and making throw; invalid_argument if the file is
/// larger than the limit, or does not fit in beside those that are open.
std::shared_ptr<const BlobFile> open_or_make(const std::string& path, const BlobFileSpec& spec,
                                             const std::function<void(BlobWriter&)>& make, const BlobLimit& limit = {});

}  // namespace nb::io
