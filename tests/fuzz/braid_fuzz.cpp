// Fuzz target: any bytes are a .braid file. Whatever can be read of it is read; only nb::Error may come out. Each input
// is tried twice: as it is, and with its checksums made right, so that what stands behind them is reached.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <span>
#include <vector>

#include "base/crc32c.h"
#include "base/error.h"
#include "io/braid_file.h"
#include "io/braid_source.h"
#include "io/gguf_tokenizer.h"
#include "io/tensor_rows.h"

namespace {

using nb::io::BraidFile;

// Runs `function`; an Error is an answer, anything else ends the process.
template <class Function>
bool attempt(const Function& function) {
  try {
    function();
    return true;
  } catch (const nb::Error&) {
    return false;
  }
}

void require(bool condition) {
  if (!condition) std::abort();
}

void read_tensors(const nb::io::ModelSource& source, std::size_t size) {
  std::vector<float> row;
  std::vector<std::byte> bytes;
  for (const nb::io::TensorInfo& tensor : source.tensors()) {
    require(tensor.bytes <= size && tensor.offset <= size - tensor.bytes);
    bytes.resize(tensor.bytes);
    source.read(tensor, 0, bytes);
    const bool is_found = attempt([&] { require(source.find(tensor.name) == &tensor); });
    require(is_found == tensor.format.has_value());
    if (!is_found || nb::io::row_length(tensor) > 1 << 16) continue;
    row.resize(static_cast<std::size_t>(nb::io::row_length(tensor)));
    nb::io::read_rows(source, tensor, nb::io::num_rows(tensor) - 1, 1, row.data());
  }
}

void read_file(std::span<const std::byte> bytes) {
  const auto file = std::make_shared<const BraidFile>(bytes, "fuzz");
  require(file->version() == 1 && file->file_bytes() == bytes.size());
  for (const auto& [key, value] : file->metadata().entries()) {
    require(file->metadata().find(key) == &value);
    require(!file->metadata().describe(value).empty());
  }
  attempt([&] { static_cast<void>(nb::io::read_tokenizer_spec(file->metadata())); });
  attempt([&] { static_cast<void>(nb::io::read_chat_template(file->metadata())); });
  attempt([&] { file->verify(); });
  read_tensors(*nb::io::open_braid(file), bytes.size());
}

template <class T>
T load(const std::vector<std::byte>& bytes, std::size_t at) {
  T value;
  std::memcpy(&value, bytes.data() + at, sizeof(value));
  return value;
}

void store(std::vector<std::byte>& bytes, std::size_t at, std::uint32_t value) {
  std::memcpy(bytes.data() + at, &value, sizeof(value));
}

// Magic, version, size and the checksums of header, directory and sections, as far as these are within the bytes.
void repair(std::vector<std::byte>& bytes) {
  constexpr std::size_t kHeader = 128, kEntry = 32;
  if (bytes.size() < kHeader) return;
  std::memcpy(bytes.data(),
              "\x89"
              "BRAID\r\n\x01\0\0\0",
              12);
  const std::uint64_t size = bytes.size(), directory = load<std::uint64_t>(bytes, 24);
  std::memcpy(bytes.data() + 16, &size, sizeof(size));
  const std::uint64_t count = load<std::uint32_t>(bytes, 32);
  const std::span<const std::byte> all(bytes);
  if (directory <= size && count * kEntry <= size - directory) {
    for (std::uint64_t i = 0; i < count; ++i) {
      const std::size_t entry = directory + i * kEntry;
      const auto offset = load<std::uint64_t>(bytes, entry + 8), length = load<std::uint64_t>(bytes, entry + 16);
      const auto kind = load<std::uint32_t>(bytes, entry);
      if ((kind == 1 || kind == 2) && offset <= size && length <= size - offset) {
        store(bytes, entry + 24, nb::crc32c(all.subspan(offset, length)));
      }
    }
    store(bytes, 36, nb::crc32c(all.subspan(directory, count * kEntry)));
  }
  store(bytes, kHeader - 4, nb::crc32c(all.first(kHeader - 4)));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const auto* begin = reinterpret_cast<const std::byte*>(data);
  attempt([&] { read_file({begin, size}); });
  std::vector<std::byte> repaired(begin, begin + size);
  repair(repaired);
  attempt([&] { read_file(repaired); });
  return 0;
}
