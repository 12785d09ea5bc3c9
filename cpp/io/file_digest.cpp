#include "io/file_digest.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <ctime>
#include <filesystem>
#include <optional>
#include <span>
#include <string_view>
#include <system_error>
#include <vector>

#include "base/crc32c.h"
#include "base/error.h"
#include "io/mapped_file.h"

namespace nb::io {
namespace {

constexpr std::size_t kPieceBytes = std::size_t{1} << 20;
constexpr std::int64_t kSecond = 1'000'000'000;
constexpr std::int64_t kClockTick = kSecond / 10;  // coarser than the clock of any local file system

std::int64_t nanoseconds(const timespec& time) { return time.tv_sec * kSecond + time.tv_nsec; }

// What a remembered digest holds for; also the content of its file, with the checksum of all before it.
struct Remembered {
  char magic[8];
  std::uint64_t device;
  std::uint64_t inode;
  std::uint64_t size;
  std::int64_t modified_ns;
  std::int64_t changed_ns;  // cannot be set back, unlike the other
  Digest digest;
  std::uint32_t unused;
  std::uint32_t checksum;

  bool is_same_file(const Remembered& other) const {
    return device == other.device && inode == other.inode && size == other.size && modified_ns == other.modified_ns &&
           changed_ns == other.changed_ns;
  }
  std::uint32_t own_checksum() const {
    return crc32c(std::as_bytes(std::span(this, 1)).first(offsetof(Remembered, checksum)));
  }
};
static_assert(sizeof(Remembered) == 88, "no padding");
constexpr char kMagic[8] = {'N', 'B', 'D', 'I', 'G', 'S', 'T', '1'};

Remembered describe(const FileReader& file) {
  struct stat status {};
  NB_CHECK(::fstat(file.descriptor(), &status) == 0, io, file.path(), ": cannot be examined");
  Remembered facts{};
  std::memcpy(facts.magic, kMagic, sizeof(kMagic));
  facts.device = status.st_dev;
  facts.inode = status.st_ino;
  facts.size = static_cast<std::uint64_t>(status.st_size);
  facts.modified_ns = nanoseconds(status.st_mtim);
  facts.changed_ns = nanoseconds(status.st_ctim);
  return facts;
}

/// A name that follows from where the file really is, not from how it is reached.
std::string cache_path(const std::string& path, const std::string& cache_directory) {
  std::error_code error;
  const std::filesystem::path real = std::filesystem::canonical(path, error);
  const std::string name = error ? path : real.string();
  Sha256 hash;
  hash.update(std::as_bytes(std::span(name)));
  return concat(cache_directory, "/file-", to_hex(hash.finish()).substr(0, 32), ".digest");
}

std::optional<Digest> recall(const std::string& remembered_at, const Remembered& file) {
  try {
    const FileReader reader(remembered_at);
    Remembered found{};
    if (reader.size() != sizeof(found)) return std::nullopt;
    reader.read(0, std::as_writable_bytes(std::span(&found, 1)));
    const bool whole = std::memcmp(found.magic, kMagic, sizeof(kMagic)) == 0 && found.own_checksum() == found.checksum;
    if (whole && found.is_same_file(file)) return found.digest;
  } catch (const Error&) {  // not there, or not readable: as if never asked
  }
  return std::nullopt;
}

void remember(const std::string& remembered_at, const Remembered& file) {
  static std::atomic<std::uint32_t> counter{0};
  const std::filesystem::path folder = std::filesystem::path(remembered_at).parent_path();
  const std::string temporary =
      concat(folder.string(), "/.writing-digest-", ::getpid(), '-', counter.fetch_add(1, std::memory_order_relaxed));
  const int descriptor = ::open(temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
  if (descriptor < 0) return;
  const bool written = ::write(descriptor, &file, sizeof(file)) == static_cast<ssize_t>(sizeof(file));
  ::close(descriptor);
  if (!written || ::rename(temporary.c_str(), remembered_at.c_str()) != 0) ::unlink(temporary.c_str());
}

bool is_settled(const Remembered& file) {
  timespec now{};
  ::clock_gettime(CLOCK_REALTIME, &now);
  return nanoseconds(now) - std::max(file.modified_ns, file.changed_ns) > kClockTick;
}

}  // namespace

Digest file_digest(const std::string& path, const std::string& cache_directory, const ProgressFunction& progress) {
  const FileReader file(path);
  Remembered facts = describe(file);
  // A file changed within the last tick may change again without its times showing it.
  const bool use_cache = !cache_directory.empty() && is_settled(facts);
  const std::string remembered_at = use_cache ? cache_path(path, cache_directory) : std::string();
  if (use_cache) {
    if (const std::optional<Digest> digest = recall(remembered_at, facts)) {
      if (progress) progress(facts.size, facts.size);
      return *digest;
    }
  }
  Sha256 hash;
  std::vector<std::byte> piece(std::min<std::uint64_t>(kPieceBytes, facts.size));
  for (std::uint64_t done = 0; done < facts.size;) {
    const auto some = std::span(piece).first(std::min<std::uint64_t>(piece.size(), facts.size - done));
    file.read(done, some);
    hash.update(some);
    done += some.size();
    if (progress) progress(done, facts.size);
  }
  NB_CHECK(describe(file).is_same_file(facts), io, path, ": the file was changed while it was read");
  facts.digest = hash.finish();
  facts.checksum = facts.own_checksum();
  if (use_cache) remember(remembered_at, facts);
  return facts.digest;
}

Digest model_digest(const ModelSource& source, const std::string& cache_directory, const ProgressFunction& progress) {
  constexpr std::string_view kTag = "nanobraid model files";
  Sha256 hash;
  hash.update(std::as_bytes(std::span(kTag)));
  std::uint64_t before = 0;
  for (const std::string& part : source.parts()) {
    std::uint64_t part_bytes = 0;
    const auto count = [&](std::uint64_t done, std::uint64_t all) {
      part_bytes = all;
      if (progress) progress(before + done, source.file_bytes());
    };
    hash.update(file_digest(part, cache_directory, count));
    before += part_bytes;
  }
  return hash.finish();
}

}  // namespace nb::io
