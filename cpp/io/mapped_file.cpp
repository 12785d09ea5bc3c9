#include "io/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>
#include <utility>

#include "base/error.h"

namespace nb::io {
namespace {

// Linux transfers at most this much per call; a longer request would look like a short read.
constexpr std::size_t kMaxTransfer = std::size_t{1} << 30;

std::string reason(int error) { return std::generic_category().message(error); }

}  // namespace

FileReader::FileReader(const std::string& path) : path_(path) {
  // Without O_NONBLOCK, opening a pipe would wait for a writer.
  do {
    descriptor_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
  } while (descriptor_ < 0 && errno == EINTR);
  NB_CHECK(descriptor_ >= 0, io, path, ": cannot open: ", reason(errno));

  struct stat status {};
  const int error = ::fstat(descriptor_, &status) == 0 ? 0 : errno;
  const char* refusal = error != 0                 ? "cannot be examined"
                        : S_ISDIR(status.st_mode)  ? "is a directory, expected a file"
                        : !S_ISREG(status.st_mode) ? "is not a regular file"
                                                   : nullptr;
  if (refusal != nullptr) {
    ::close(std::exchange(descriptor_, -1));  // the destructor of a half-made object does not run
    fail(ErrorCode::io, path, ": ", refusal, error != 0 ? ": " + reason(error) : std::string());
  }
  size_ = static_cast<std::uint64_t>(status.st_size);
}

FileReader::~FileReader() {
  if (descriptor_ >= 0) ::close(descriptor_);
}

void FileReader::read(std::uint64_t offset, std::span<std::byte> out) const {
  constexpr std::uint64_t kMaxOffset = std::uint64_t{1} << 62;
  NB_CHECK(offset <= kMaxOffset && out.size() <= kMaxOffset, io, path_, ": cannot read ", out.size(),
           " bytes at offset ", offset, ": beyond any file");
  std::size_t done = 0;
  while (done < out.size()) {
    const std::size_t wanted = std::min(out.size() - done, kMaxTransfer);
    const ssize_t got = ::pread(descriptor_, out.data() + done, wanted, static_cast<off_t>(offset + done));
    if (got < 0 && errno == EINTR) continue;
    NB_CHECK(got >= 0, io, path_, ": cannot read ", out.size(), " bytes at offset ", offset, ": ", reason(errno));
    NB_CHECK(got > 0, io, path_, ": cannot read ", out.size(), " bytes at offset ", offset, ": the file ends after ",
             done);
    done += static_cast<std::size_t>(got);
  }
}

MappedFile::MappedFile(const std::string& path) : reader_(path) {
  const std::uint64_t size = reader_.size();
  NB_CHECK(size > 0, format, path, ": the file is empty");
  void* address = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, reader_.descriptor(), 0);
  NB_CHECK(address != MAP_FAILED, io, path, ": cannot map ", size, " bytes: ", reason(errno));
  bytes_ = {static_cast<const std::byte*>(address), size};
}

MappedFile::~MappedFile() { ::munmap(const_cast<std::byte*>(bytes_.data()), bytes_.size()); }

std::span<const std::byte> MappedFile::bytes_at(std::uint64_t offset, std::uint64_t length) const {
  NB_CHECK(offset <= bytes_.size() && length <= bytes_.size() - offset, format, reader_.path(), ": ", length,
           " bytes at offset ", offset, " are beyond the end of the file (", bytes_.size(), " bytes)");
  return bytes_.subspan(offset, length);
}

void MappedFile::advise_dont_need() const {
  // Advice: a system that refuses it keeps the pages, which is no error.
  static_cast<void>(::madvise(const_cast<std::byte*>(bytes_.data()), bytes_.size(), MADV_DONTNEED));
}

}  // namespace nb::io
