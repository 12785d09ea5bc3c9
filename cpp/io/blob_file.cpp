// Layout, little-endian; blobs begin at multiples of 4096:
//
//   0   8   magic
//   8   8   number of blobs
//   16  32  identity
//   48  24  of each blob: offset (8), bytes (8), CRC32C (4), zero (4)
//       4   CRC32C of all before
#include "io/blob_file.h"

#include <fcntl.h>
#include <linux/aio_abi.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <mutex>
#include <system_error>
#include <utility>

#include "base/crc32c.h"
#include "base/error.h"

namespace nb::io {
namespace {

constexpr char kMagic[8] = {'N', 'B', 'B', 'L', 'O', 'B', 'S', '1'};
constexpr std::size_t kFixedBytes = 48, kEntryBytes = 24;
// Of one read: long for a disk, and still in the processor's cache when it is summed up.
constexpr std::size_t kPieceBytes = std::size_t{1} << 20;
// Reads that a disk is given at once, so that it works on while the reader sums up, or waits for a processor that
// others have: 8 MB are 8 ms of a disk of 1 GB/s.
constexpr std::size_t kDepth = 8;

std::string reason(int error) { return std::generic_category().message(error); }

std::size_t header_bytes(std::size_t num_blobs) { return kFixedBytes + num_blobs * kEntryBytes + 4; }

std::uint64_t first_offset(std::size_t num_blobs) { return blob_room(header_bytes(num_blobs)); }

template <class Number>
void append(std::vector<std::byte>& out, Number value) {
  const auto bytes = std::as_bytes(std::span(&value, 1));
  out.insert(out.end(), bytes.begin(), bytes.end());
}

std::vector<std::byte> encode_header(const BlobFileSpec& spec, const std::vector<std::uint32_t>& checksums) {
  std::vector<std::byte> out;
  for (const char letter : kMagic) append(out, letter);
  append(out, std::uint64_t{spec.blob_bytes.size()});
  out.insert(out.end(), spec.identity.begin(), spec.identity.end());
  std::uint64_t offset = first_offset(spec.blob_bytes.size());
  for (std::size_t i = 0; i < spec.blob_bytes.size(); ++i) {
    append(out, offset);
    append(out, spec.blob_bytes[i]);
    append(out, checksums[i]);
    append(out, std::uint32_t{0});
    offset += blob_room(spec.blob_bytes[i]);
  }
  append(out, crc32c(out));
  return out;
}

template <class Number>
Number number_at(std::span<const std::byte> bytes, std::size_t offset) {
  Number value;
  std::memcpy(&value, bytes.data() + offset, sizeof(value));
  return value;
}

}  // namespace

// Direct reads that the kernel works on by itself, by its own interface (io_setup(2)); of one thread at a time.
class BlobFile::Queue {
 public:
  /// Null where the system has none, or gives no more of them.
  static std::unique_ptr<Queue> create() {
    auto queue = std::make_unique<Queue>();
    if (::syscall(SYS_io_setup, kDepth, &queue->context_) != 0) return nullptr;
    return queue;
  }
  Queue() = default;
  ~Queue() {
    if (context_ != 0) ::syscall(SYS_io_destroy, context_);
  }
  Queue(const Queue&) = delete;
  Queue& operator=(const Queue&) = delete;

  /// False if the system does not take it.
  bool begin(int descriptor, std::uint64_t offset, std::span<std::byte> out, std::size_t number) {
    iocb& request = requests_[number % kDepth];
    request = {};
    request.aio_data = number;
    request.aio_lio_opcode = IOCB_CMD_PREAD;
    request.aio_fildes = static_cast<std::uint32_t>(descriptor);
    request.aio_buf = reinterpret_cast<std::uint64_t>(out.data());
    request.aio_nbytes = out.size();
    request.aio_offset = static_cast<std::int64_t>(offset);
    iocb* pointer = &request;
    return ::syscall(SYS_io_submit, context_, 1, &pointer) == 1;
  }

  /// Waits for one or more that have begun.
  std::span<const io_event> wait() {
    while (true) {
      const long count = ::syscall(SYS_io_getevents, context_, 1, events_.size(), events_.data(), nullptr);
      if (count > 0) return {events_.data(), static_cast<std::size_t>(count)};
      NB_CHECK(count == 0 || errno == EINTR, internal, "a queue of reads failed: ", reason(errno));
    }
  }

  std::mutex mutex;

 private:
  aio_context_t context_ = 0;
  std::array<iocb, kDepth> requests_{};
  std::array<io_event, kDepth> events_{};
};

std::uint64_t BlobFileSpec::file_bytes() const {
  std::uint64_t total = first_offset(blob_bytes.size());
  for (const std::uint64_t bytes : blob_bytes) total += blob_room(bytes);
  return total;
}

BlobWriter::BlobWriter(const std::string& path, BlobFileSpec spec)
    : spec_(std::move(spec)),
      file_(path, std::filesystem::path(path).filename().string(), spec_.file_bytes()),
      offset_(first_offset(spec_.blob_bytes.size())) {}

void BlobWriter::write(std::span<const std::byte> blob) {
  NB_ASSERT(checksums_.size() < spec_.blob_bytes.size() && blob.size() == spec_.blob_bytes[checksums_.size()]);
  file_.write_at(offset_, blob);
  offset_ += blob_room(blob.size());
  checksums_.push_back(crc32c(blob));
}

void BlobWriter::finish() {
  NB_ASSERT(checksums_.size() == spec_.blob_bytes.size());
  file_.write_at(0, encode_header(spec_, checksums_));
  file_.publish();
}

BlobFile::BlobFile(const std::string& path, const BlobFileSpec& spec) : file_(path) {
  // Nobody removes it for its room while it is open, see blob_cache.cpp, which takes the oldest ones first.
  while (::flock(file_.descriptor(), LOCK_SH) != 0 && errno == EINTR) {
  }
  struct stat facts {};
  NB_CHECK(::fstat(file_.descriptor(), &facts) == 0 && facts.st_nlink > 0, format, path, ": was removed just now");
  static_cast<void>(::futimens(file_.descriptor(), nullptr));
  const std::size_t num_blobs = spec.blob_bytes.size();
  std::vector<std::byte> header(header_bytes(num_blobs));
  NB_CHECK(file_.size() >= first_offset(num_blobs), format, path, ": ", file_.size(), " bytes are too few for ",
           num_blobs, " blobs");
  file_.read(0, header);
  NB_CHECK(std::memcmp(header.data(), kMagic, sizeof(kMagic)) == 0, format, path, ": no file of blobs");
  NB_CHECK(number_at<std::uint64_t>(header, 8) == num_blobs &&
               std::equal(spec.identity.begin(), spec.identity.end(), header.begin() + 16),
           format, path, ": made from something else");
  const std::span<const std::byte> summed = std::span(header).first(header.size() - 4);
  NB_CHECK(number_at<std::uint32_t>(header, summed.size()) == crc32c(summed), format, path,
           ": the directory is damaged");
  for (std::size_t i = 0; i < num_blobs; ++i) {
    const std::size_t at = kFixedBytes + i * kEntryBytes;
    entries_.push_back({number_at<std::uint64_t>(header, at), number_at<std::uint64_t>(header, at + 8),
                        number_at<std::uint32_t>(header, at + 16)});
    NB_CHECK(entries_.back().bytes == spec.blob_bytes[i], format, path, ": blob ", i, " has ", entries_.back().bytes,
             " bytes, expected ", spec.blob_bytes[i]);
  }
  NB_CHECK(file_.size() >= spec.file_bytes(), format, path, ": cut off, ", file_.size(), " of ", spec.file_bytes(),
           " bytes");

  static_cast<void>(::posix_fadvise(file_.descriptor(), 0, 0, POSIX_FADV_DONTNEED));  // what writing left
  // Some file systems accept the flag and refuse the reads.
  const int flags = ::fcntl(file_.descriptor(), F_GETFL);
  is_direct_ = flags >= 0 && ::fcntl(file_.descriptor(), F_SETFL, flags | O_DIRECT) == 0;
  if (is_direct_) {
    alignas(kBlobAlignment) static thread_local std::byte probe[kBlobAlignment];
    is_direct_ = ::pread(file_.descriptor(), probe, sizeof(probe), 0) == static_cast<ssize_t>(sizeof(probe));
    if (!is_direct_) static_cast<void>(::fcntl(file_.descriptor(), F_SETFL, flags));
  }
  if (is_direct_) queue_ = Queue::create();
}

BlobFile::~BlobFile() = default;

void BlobFile::read(int index, std::span<std::byte> out) const {
  const Entry& entry = entries_[static_cast<std::size_t>(index)];
  const auto room = static_cast<std::size_t>(blob_room(entry.bytes));
  NB_ASSERT(out.size() >= room && reinterpret_cast<std::uintptr_t>(out.data()) % kBlobAlignment == 0);
  std::optional<std::uint32_t> checksum = read_queued(entry, out.first(room));
  if (!checksum) checksum = read_in_turn(index, out.first(room));  // which says what is wrong, if something is
  NB_CHECK(*checksum == entry.checksum, format, path(), ": blob ", index, " is damaged");
}

std::uint64_t BlobFile::blob_bytes(int index) const { return entries_[static_cast<std::size_t>(index)].bytes; }

void BlobFile::check(int index, std::span<const std::byte> blob) const {
  const Entry& entry = entries_[static_cast<std::size_t>(index)];
  NB_CHECK(blob.size() == entry.bytes && crc32c(blob) == entry.checksum, format, path(), ": blob ", index,
           " held something else");
}

void BlobFile::mend(int index, std::span<const std::byte> blob) const {
  check(index, blob);
  std::uint64_t offset = entries_[static_cast<std::size_t>(index)].offset;
  const std::uint64_t end = offset + blob_room(blob.size());
  // By way of the open file, whatever has its name by now.
  const std::string open_file = concat("/proc/self/fd/", file_.descriptor());
  const int descriptor = ::open(open_file.c_str(), O_WRONLY | O_CLOEXEC);
  NB_CHECK(descriptor >= 0, io, path(), ": cannot open to write: ", reason(errno));
  int error = 0;
  while (error == 0 && !blob.empty()) {
    const ssize_t done = ::pwrite(descriptor, blob.data(), blob.size(), static_cast<off_t>(offset));
    if (done < 0 && errno == EINTR) continue;
    error = done > 0 ? 0 : done < 0 ? errno : EIO;
    if (error != 0) break;
    offset += static_cast<std::uint64_t>(done);
    blob = blob.subspan(static_cast<std::size_t>(done));
  }
  struct stat facts {};  // a file that was cut off grows again
  if (error == 0 && (::fstat(descriptor, &facts) != 0 || (static_cast<std::uint64_t>(facts.st_size) < end &&
                                                          ::ftruncate(descriptor, static_cast<off_t>(end)) != 0))) {
    error = errno;
  }
  if (error == 0 && ::fdatasync(descriptor) != 0) error = errno;
  ::close(descriptor);
  NB_CHECK(error == 0, io, path(), ": cannot write blob ", index, ": ", reason(error));
}

void BlobFile::remove() const { static_cast<void>(::unlink(path().c_str())); }

/// The checksum of what was read; nothing if there is no queue, another thread has it, or a read failed.
std::optional<std::uint32_t> BlobFile::read_queued(const Entry& entry, std::span<std::byte> out) const {
  if (queue_ == nullptr) return std::nullopt;
  const std::unique_lock lock(queue_->mutex, std::try_to_lock);
  if (!lock) return std::nullopt;
  const std::size_t num_pieces = ceil_div(out.size(), kPieceBytes);
  const auto piece = [&](std::size_t number) {
    const std::size_t begin = number * kPieceBytes;
    return out.subspan(begin, std::min(kPieceBytes, out.size() - begin));
  };
  std::array<bool, kDepth> has_come{};
  std::size_t num_begun = 0, num_under_way = 0, num_summed = 0;
  std::uint32_t checksum = 0;
  bool good = true;
  while (true) {
    for (; good && num_begun < std::min(num_pieces, num_summed + kDepth); ++num_begun, ++num_under_way) {
      const std::uint64_t offset = entry.offset + num_begun * kPieceBytes;
      good = queue_->begin(file_.descriptor(), offset, piece(num_begun), num_begun);
      if (!good) break;
    }
    if (num_under_way == 0) break;  // also after an error: the kernel writes until the last one has come
    for (const io_event& event : queue_->wait()) {
      good = good && event.res == static_cast<std::int64_t>(piece(event.data).size());
      has_come[event.data % kDepth] = true;
      --num_under_way;
    }
    for (; good && num_summed < num_begun && has_come[num_summed % kDepth]; ++num_summed) {
      has_come[num_summed % kDepth] = false;
      const std::size_t begin = num_summed * kPieceBytes;
      const std::size_t own = begin < entry.bytes ? std::min<std::size_t>(kPieceBytes, entry.bytes - begin) : 0;
      checksum = crc32c(piece(num_summed).first(own), checksum);
    }
  }
  return good ? std::optional(checksum) : std::nullopt;
}

/// One read after the other.
std::uint32_t BlobFile::read_in_turn(int index, std::span<std::byte> out) const {
  const Entry& entry = entries_[static_cast<std::size_t>(index)];
  std::uint32_t checksum = 0;
  for (std::size_t done = 0; done < out.size();) {
    const std::size_t wanted = std::min(kPieceBytes, out.size() - done);
    const auto offset = static_cast<off_t>(entry.offset + done);
    const ssize_t got = ::pread(file_.descriptor(), out.data() + done, wanted, offset);
    if (got < 0 && errno == EINTR) continue;
    NB_CHECK(got >= 0, io, path(), ": cannot read ", wanted, " bytes at offset ", offset, ": ", reason(errno));
    // What a direct read gives ends at a block, but for the end of the file.
    const auto usable = static_cast<std::size_t>(got) / kBlobAlignment * kBlobAlignment;
    NB_CHECK(usable > 0, io, path(), ": ends in blob ", index, ", ", got, " of ", wanted, " bytes at offset ", offset);
    if (!is_direct_) static_cast<void>(::posix_fadvise(file_.descriptor(), offset, got, POSIX_FADV_DONTNEED));
    const std::size_t own = done < entry.bytes ? std::min<std::size_t>(usable, entry.bytes - done) : 0;
    checksum = crc32c(out.subspan(done, own), checksum);
    done += usable;
  }
  return checksum;
}

}  // namespace nb::io
