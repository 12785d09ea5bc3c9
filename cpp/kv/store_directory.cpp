#include "kv/store_directory.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <ctime>
#include <filesystem>
#include <memory>
#include <string_view>
#include <system_error>
#include <utility>

#include "base/error.h"

namespace nb::kv {
namespace {

constexpr std::string_view kTemporaryPrefix = ".writing-";
constexpr std::int64_t kSecond = 1'000'000'000;
constexpr std::int64_t kAbandonedAfter = 3600 * kSecond;    // where locks do not tell
constexpr std::int64_t kClockTick = kSecond / 20;           // coarser than any kernel's
constexpr std::size_t kMaxTransfer = std::size_t{8} << 20;  // small enough to be stopped between two

std::string reason(int error) { return std::generic_category().message(error); }

std::int64_t nanoseconds(const timespec& time) { return time.tv_sec * kSecond + time.tv_nsec; }

std::int64_t now_ns() {
  timespec now{};
  ::clock_gettime(CLOCK_REALTIME, &now);
  return nanoseconds(now);
}

ListedFile facts_of(std::string name, const struct stat& status) {
  return {.name = std::move(name),
          .bytes = status.st_size,
          .modified_ns = nanoseconds(status.st_mtim),
          .pinned = (status.st_mode & S_IWUSR) == 0};
}

int make_directory(const std::string& path) {
  std::error_code ignored;  // what matters is whether the last one can be made
  const std::filesystem::path above = std::filesystem::path(path).parent_path();
  if (!above.empty()) std::filesystem::create_directories(above, ignored);
  return ::mkdir(path.c_str(), 0700) == 0 || errno == EEXIST ? 0 : errno;
}

}  // namespace

void FileCalls::fill_in() {
  if (!write) write = ::write;
  if (!pread) pread = ::pread;
  if (!fsync) fsync = ::fsync;
  if (!rename) {
    rename = [](int folder, const char* from, const char* to) { return ::renameat(folder, from, folder, to); };
  }
}

StoreFile::StoreFile(int descriptor, ListedFile facts, const FileCalls& calls)
    : descriptor_(descriptor), facts_(std::move(facts)), calls_(calls) {}

StoreFile::StoreFile(StoreFile&& other) noexcept
    : descriptor_(std::exchange(other.descriptor_, -1)), facts_(std::move(other.facts_)), calls_(other.calls_) {}

StoreFile::~StoreFile() {
  if (descriptor_ >= 0) ::close(descriptor_);
}

int StoreFile::read(std::uint64_t offset, std::span<std::byte> out) const {
  std::size_t done = 0;
  while (done < out.size()) {
    const std::size_t wanted = std::min(out.size() - done, kMaxTransfer);
    const ssize_t got = calls_.pread(descriptor_, out.data() + done, wanted, static_cast<off_t>(offset + done));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return errno;
    if (got == 0) return EOVERFLOW;
    done += static_cast<std::size_t>(got);
  }
  return 0;
}

void StoreFile::touch() const { static_cast<void>(::futimens(descriptor_, nullptr)); }

void StoreFile::prefetch() const { static_cast<void>(::posix_fadvise(descriptor_, 0, 0, POSIX_FADV_WILLNEED)); }

StoreDirectory::StoreDirectory(const std::string& path, FileCalls calls) : path_(path), calls_(std::move(calls)) {
  calls_.fill_in();
  NB_CHECK(!path.empty() && path.find('\0') == std::string::npos, io, "the path of a disk store is empty or no path");
  int error = make_directory(path);
  NB_CHECK(error == 0, io, path, ": cannot create the directory: ", reason(error));
  folder_ = ::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  NB_CHECK(folder_ >= 0, io, path, ": cannot open the directory: ", reason(errno));
  if (::faccessat(folder_, ".", R_OK | W_OK | X_OK, AT_EACCESS) != 0) {
    error = errno;
    ::close(std::exchange(folder_, -1));  // the destructor of a half-made object does not run
    fail(ErrorCode::io, path, ": cannot write to the directory: ", reason(error));
  }
}

StoreDirectory::~StoreDirectory() { ::close(folder_); }

std::int64_t StoreDirectory::modified_ns() const {
  struct stat status {};
  if (::fstat(folder_, &status) != 0) return -1;
  const std::int64_t modified = nanoseconds(status.st_mtim);
  return now_ns() - modified > kClockTick ? modified : -1;
}

std::vector<ListedFile> StoreDirectory::list(const std::function<bool(const std::string&)>& wanted) const {
  std::vector<ListedFile> files;
  const int copy = ::openat(folder_, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);  // with a read position of its own
  if (copy < 0) return files;
  const std::unique_ptr<DIR, int (*)(DIR*)> stream(::fdopendir(copy), ::closedir);
  if (stream == nullptr) {
    ::close(copy);
    return files;
  }
  while (const dirent* entry = ::readdir(stream.get())) {
    std::string name(entry->d_name);
    struct stat status {};
    if (!wanted(name) || ::fstatat(folder_, name.c_str(), &status, AT_SYMLINK_NOFOLLOW) != 0) continue;
    if (S_ISREG(status.st_mode)) files.push_back(facts_of(std::move(name), status));
  }
  return files;
}

std::optional<StoreFile> StoreDirectory::open(const std::string& name, int* error) const {
  // Without O_NONBLOCK, opening a pipe would wait for a writer.
  const int descriptor = ::openat(folder_, name.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY);
  *error = descriptor < 0 ? errno : 0;
  if (descriptor < 0) return std::nullopt;
  struct stat status {};
  *error = ::fstat(descriptor, &status) != 0 ? errno : S_ISREG(status.st_mode) ? 0 : EINVAL;
  if (*error != 0) {
    ::close(descriptor);
    return std::nullopt;
  }
  return std::optional<StoreFile>(std::in_place, descriptor, facts_of(name, status), calls_);
}

int StoreDirectory::write_all(int descriptor, std::span<const std::byte> bytes) const {
  while (!bytes.empty()) {
    const ssize_t written = calls_.write(descriptor, bytes.data(), std::min(bytes.size(), kMaxTransfer));
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) return errno;
    if (written == 0) return EIO;  // never happens to regular files; must not loop
    bytes = bytes.subspan(static_cast<std::size_t>(written));
  }
  return 0;
}

/// A new temporary file, locked: the lock ends with its writer and tells others that there is one. Its descriptor, or
/// the negative error.
int StoreDirectory::open_temporary(std::string* name) const {
  static std::atomic<std::uint32_t> counter{0};
  for (int attempt = 0; attempt < 100; ++attempt) {
    *name = concat(kTemporaryPrefix, ::getpid(), '-', now_ns(), '-', counter.fetch_add(1, std::memory_order_relaxed));
    const int descriptor = ::openat(folder_, name->c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (descriptor < 0 && errno == EEXIST) continue;
    if (descriptor < 0) return -errno;
    // Between creating and locking, another process may have taken the file for an abandoned one.
    static_cast<void>(::flock(descriptor, LOCK_EX));
    struct stat status {};
    if (::fstat(descriptor, &status) == 0 && status.st_nlink > 0) return descriptor;
    ::close(descriptor);
  }
  return -EEXIST;
}

int StoreDirectory::create(const std::string& name, std::span<const std::span<const std::byte>> pieces,
                           bool pinned) const {
  std::string temporary;
  const int descriptor = open_temporary(&temporary);
  if (descriptor < 0) return -descriptor;
  // A umask may have taken bits of the mode away.
  int error = ::fchmod(descriptor, pinned ? 0400 : 0600) == 0 ? 0 : errno;
  for (const std::span<const std::byte> piece : pieces) {
    if (error == 0) error = write_all(descriptor, piece);
  }
  // On disk before it has its name: a name never stands for content that a power failure could take away.
  if (error == 0 && calls_.fsync(descriptor) != 0) error = errno;
  if (error == 0 && calls_.rename(folder_, temporary.c_str(), name.c_str()) != 0) error = errno;
  if (error != 0) ::unlinkat(folder_, temporary.c_str(), 0);
  ::close(descriptor);
  // Some file systems have nothing to synchronise for a folder and say EINVAL.
  if (error == 0 && calls_.fsync(folder_) != 0 && errno != EINVAL) error = errno;
  return error;
}

bool StoreDirectory::exists(const std::string& name) const {
  return ::faccessat(folder_, name.c_str(), F_OK, AT_SYMLINK_NOFOLLOW) == 0;
}

bool StoreDirectory::remove(const std::string& name) const { return ::unlinkat(folder_, name.c_str(), 0) == 0; }

bool StoreDirectory::set_pinned(const std::string& name, bool pinned) const {
  return ::fchmodat(folder_, name.c_str(), pinned ? 0400 : 0600, 0) == 0;
}

int StoreDirectory::remove_abandoned() const {
  int removed = 0;
  const auto is_temporary = [](const std::string& name) { return name.starts_with(kTemporaryPrefix); };
  for (const ListedFile& file : list(is_temporary)) {
    const int descriptor = ::openat(folder_, file.name.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    if (descriptor < 0) continue;
    bool abandoned = ::flock(descriptor, LOCK_EX | LOCK_NB) == 0;
    if (!abandoned && errno != EWOULDBLOCK) abandoned = now_ns() - file.modified_ns > kAbandonedAfter;
    if (abandoned && remove(file.name)) ++removed;
    ::close(descriptor);  // only now: who waits for the lock must find the file gone
  }
  return removed;
}

}  // namespace nb::kv
