#include "io/new_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <system_error>
#include <utility>

#include "base/error.h"

namespace nb::io {
namespace {

std::string reason(int error) { return std::generic_category().message(error); }

// Another name in the same folder, so that renaming stays within a file system.
std::string temporary_name(const std::string& path, const std::string& prefix) {
  static std::atomic<std::uint32_t> counter{0};
  return concat(folder_of(path), "/.", prefix, "-", ::getpid(), "-", counter.fetch_add(1, std::memory_order_relaxed),
                ".tmp");
}

void sync_folder(const std::string& folder) {
  const int descriptor = ::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  NB_CHECK(descriptor >= 0, io, folder, ": cannot open: ", reason(errno));
  // Some file systems have nothing to synchronise for a folder and say EINVAL.
  const int error = ::fsync(descriptor) == 0 || errno == EINVAL ? 0 : errno;
  ::close(descriptor);
  NB_CHECK(error == 0, io, folder, ": cannot synchronise: ", reason(error));
}

}  // namespace

std::string folder_of(const std::string& path) {
  const std::size_t slash = path.rfind('/');
  if (slash == std::string::npos) return ".";
  return slash == 0 ? "/" : path.substr(0, slash);
}

NewFile::NewFile(std::string path, const std::string& prefix, std::uint64_t bytes) : path_(std::move(path)) {
  int error = EEXIST;
  for (int attempt = 0; attempt < 100 && error == EEXIST; ++attempt) {
    temporary_path_ = temporary_name(path_, prefix);
    descriptor_ = ::open(temporary_path_.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    error = descriptor_ >= 0 ? 0 : errno;
  }
  NB_CHECK(error == 0, io, path_, ": cannot create a file in ", folder_of(path_), ": ", reason(error));
  try {
    reserve_space(bytes);
  } catch (...) {
    abandon();  // the destructor of a half-made object does not run
    throw;
  }
}

NewFile::~NewFile() { abandon(); }

void NewFile::reserve_space(std::uint64_t bytes) const {
  int error = ::fallocate(descriptor_, 0, 0, static_cast<off_t>(bytes)) == 0 ? 0 : errno;
  // A file system that cannot reserve will say so while writing.
  if (error == EOPNOTSUPP || error == ENOSYS || error == EINTR) {
    error = ::ftruncate(descriptor_, static_cast<off_t>(bytes)) == 0 ? 0 : errno;
  }
  NB_CHECK(error == 0, io, path_, ": no room for ", bytes, " bytes in ", folder_of(path_), ": ", reason(error));
}

void NewFile::write_at(std::uint64_t offset, std::span<const std::byte> bytes) const {
  while (!bytes.empty()) {
    const ssize_t done = ::pwrite(descriptor_, bytes.data(), bytes.size(), static_cast<off_t>(offset));
    if (done < 0 && errno == EINTR) continue;
    NB_CHECK(done > 0, io, path_, ": cannot write ", bytes.size(), " bytes at offset ", offset, " of ", temporary_path_,
             ": ", reason(done < 0 ? errno : EIO));
    offset += static_cast<std::uint64_t>(done);
    bytes = bytes.subspan(static_cast<std::size_t>(done));
  }
}

void NewFile::publish() {
  NB_CHECK(::fsync(descriptor_) == 0, io, path_, ": cannot synchronise ", temporary_path_, ": ", reason(errno));
  NB_CHECK(::rename(temporary_path_.c_str(), path_.c_str()) == 0, io, path_, ": cannot rename ", temporary_path_,
           " to it: ", reason(errno));
  ::close(std::exchange(descriptor_, -1));
  sync_folder(folder_of(path_));
}

void NewFile::abandon() noexcept {
  if (descriptor_ < 0) return;
  ::unlink(temporary_path_.c_str());
  ::close(std::exchange(descriptor_, -1));
}

}  // namespace nb::io
