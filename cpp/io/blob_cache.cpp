#include "io/blob_cache.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <optional>
#include <system_error>
#include <tuple>
#include <utility>
#include <vector>

#include "base/error.h"
#include "base/log.h"
#include "io/new_file.h"

namespace nb::io {
namespace {

namespace fs = std::filesystem;

constexpr const char* kLockEnding = ".lock";

// Held while it lives, by one thread of one process. A file system without locks has none: then two may make the same
// file, each under a name of its own, and the last one stays.
class Lock {
 public:
  explicit Lock(const std::string& path) : descriptor_(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666)) {
    NB_CHECK(descriptor_ >= 0, io, path, ": cannot create: ", std::generic_category().message(errno));
    while (::flock(descriptor_, LOCK_EX) != 0 && errno == EINTR) {
    }
  }
  ~Lock() {
    if (descriptor_ >= 0) ::close(descriptor_);
  }
  Lock(Lock&& other) noexcept : descriptor_(std::exchange(other.descriptor_, -1)) {}
  Lock(const Lock&) = delete;
  Lock& operator=(const Lock&) = delete;

  /// Of a file that may be there or not; nothing if someone has it, or if there are no locks.
  static std::optional<Lock> try_now(const std::string& path, int flags) {
    Lock lock;
    lock.descriptor_ = ::open(path.c_str(), O_RDWR | O_CLOEXEC | flags, 0666);
    if (lock.descriptor_ < 0 || ::flock(lock.descriptor_, LOCK_EX | LOCK_NB) != 0) return std::nullopt;
    return lock;
  }

 private:
  Lock() = default;

  int descriptor_ = -1;
};

std::string name_of(const fs::path& path) { return path.filename().string(); }

// Of writers that were killed. For who holds the lock.
void remove_abandoned(const std::string& path) {
  std::error_code error;
  const std::string prefix = concat(".", name_of(path), "-");
  for (const auto& entry : fs::directory_iterator(folder_of(path), error)) {
    const std::string name = name_of(entry.path());
    std::error_code ignored;
    if (name.starts_with(prefix) && name.ends_with(".tmp")) fs::remove(entry.path(), ignored);
  }
}

// Removes a file unless somebody makes it or has it open.
bool remove_unused(const std::string& path) {
  const std::string lock_path = path + kLockEnding;
  const std::optional<Lock> making = Lock::try_now(lock_path, O_CREAT);
  if (!making) return false;
  const std::optional<Lock> reading = Lock::try_now(path, 0);
  if (!reading || ::unlink(path.c_str()) != 0) return false;
  static_cast<void>(::unlink(lock_path.c_str()));
  log(LogLevel::info, path, ": removed, to make room");
  return true;
}

// The file that a writer's hidden one becomes; empty for other files.
std::string becomes(const std::string& name, const std::string& ending) {
  if (!name.starts_with('.') || !name.ends_with(".tmp")) return "";
  const std::size_t at = name.rfind(ending + "-");
  return at == std::string::npos ? "" : name.substr(1, at + ending.size() - 1);
}

struct CachedFile {
  fs::file_time_type used;
  std::string path;
  std::uint64_t bytes;
};

/// Removes files like `path` until it and they take no more than the limit together, as far as that is possible.
/// Returns what the others take then.
std::uint64_t make_room(const std::string& path, std::uint64_t own_bytes, std::uint64_t limit) {
  const std::string folder = folder_of(path), ending = fs::path(path).extension().string();
  std::vector<CachedFile> files;
  std::uint64_t others = 0;
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(folder, error)) {
    const std::string name = name_of(entry.path());
    const std::string target = becomes(name, ending);
    if (name == name_of(path) || (target.empty() && (name.starts_with('.') || !name.ends_with(ending)))) continue;
    std::error_code gone, never;
    const std::uint64_t bytes = fs::file_size(entry.path(), gone);
    const fs::file_time_type used = fs::last_write_time(entry.path(), never);
    if (gone || never) continue;
    if (!target.empty()) {  // a writer is at it, or was killed
      if (const auto lock = Lock::try_now(concat(folder, "/", target, kLockEnding), O_CREAT);
          lock && fs::remove(entry.path(), gone)) {
        continue;
      }
    } else {
      files.push_back({used, entry.path().string(), bytes});
    }
    others += bytes;
  }
  std::sort(files.begin(), files.end(),
            [](const auto& a, const auto& b) { return std::tie(a.used, a.path) < std::tie(b.used, b.path); });
  for (const CachedFile& file : files) {
    if (others + own_bytes <= limit) break;
    if (remove_unused(file.path)) others -= file.bytes;
  }
  return others;
}

// Opens the file if it is the one that is wanted; null and the reason if not.
std::shared_ptr<const BlobFile> open_if_good(const std::string& path, const BlobFileSpec& spec, std::string& why) {
  if (std::error_code error; !fs::exists(path, error)) return nullptr;
  try {
    return std::make_shared<const BlobFile>(path, spec);
  } catch (const Error& error) {
    if (error.code() != ErrorCode::format) throw;
    why = error.what();
    return nullptr;
  }
}

}  // namespace

std::shared_ptr<const BlobFile> open_or_make(const std::string& path, const BlobFileSpec& spec,
                                             const std::function<void(BlobWriter&)>& make, const BlobLimit& limit) {
  const std::uint64_t bytes = spec.file_bytes();
  NB_CHECK(limit.bytes == 0 || bytes <= limit.bytes, invalid_argument, limit.name, " is ", limit.bytes, ", but ", path,
           " takes ", bytes, " bytes");
  const auto folder_lock = [&] { return Lock(concat(folder_of(path), "/.limit", kLockEnding)); };
  std::string why;
  const auto open = [&] {
    auto file = open_if_good(path, spec, why);
    if (file != nullptr && limit.bytes > 0) {
      const Lock lock = folder_lock();
      make_room(path, bytes, limit.bytes);
    }
    return file;
  };
  if (auto file = open()) return file;
  const Lock lock(path + kLockEnding);
  if (auto file = open()) return file;  // another was faster
  if (!why.empty()) log(LogLevel::warning, why, "; it is made again");
  remove_abandoned(path);
  {
    std::optional<BlobWriter> writer;
    if (limit.bytes > 0) {
      const Lock others_wait = folder_lock();  // until the room is taken
      const std::uint64_t others = make_room(path, bytes, limit.bytes);
      NB_CHECK(others + bytes <= limit.bytes, invalid_argument, limit.name, " is ", limit.bytes, ", but ", path,
               " takes ", bytes, " bytes, and files beside it that are in use take ", others);
      writer.emplace(path, spec);
    } else {
      writer.emplace(path, spec);
    }
    make(*writer);
    writer->finish();
  }
  return std::make_shared<const BlobFile>(path, spec);
}

}  // namespace nb::io
