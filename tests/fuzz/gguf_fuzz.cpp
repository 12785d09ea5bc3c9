// Fuzz target: any bytes are a GGUF file. Whatever can be read of it is read; only nb::Error may come out.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <span>
#include <vector>

#include "base/error.h"
#include "io/gguf_file.h"
#include "io/gguf_source.h"
#include "io/gguf_tokenizer.h"

namespace {

using nb::io::GgufFile;

// Runs `function`; an Error is an answer, anything else ends the process.
template <class Function>
void attempt(const Function& function) {
  try {
    function();
  } catch (const nb::Error&) {
  }
}

void require(bool condition) {
  if (!condition) std::abort();
}

void read_metadata(const nb::io::Metadata& metadata) {
  for (const auto& entry : metadata.entries()) {
    const auto key = entry.first;
    require(metadata.find(key) == &entry.second);
    require(!metadata.describe(entry.second).empty());
    attempt([&] { static_cast<void>(metadata.u64(key)); });
    attempt([&] { static_cast<void>(metadata.i64(key)); });
    attempt([&] { static_cast<void>(metadata.f32(key)); });
    attempt([&] { static_cast<void>(metadata.boolean(key)); });
    attempt([&] { static_cast<void>(metadata.string(key)); });
    attempt([&] { require(metadata.strings(key).size() == entry.second.count); });
    attempt([&] { require(metadata.integers(key).size() == entry.second.count); });
  }
}

void read_weights(std::span<const std::byte> bytes) {
  const auto file = std::make_shared<const GgufFile>(bytes, "fuzz");
  const std::shared_ptr<const nb::io::ModelSource> source = nb::io::open_gguf(file);
  std::vector<std::byte> row;
  for (const nb::io::GgufTensor& tensor : file->tensors()) {
    attempt([&] {
      const nb::io::TensorInfo* info = source->find(tensor.name);
      require(info != nullptr && info->bytes == tensor.bytes && info->shape.size() == tensor.dims.size());
      row.resize(info->bytes);
      source->read(*info, 0, row);
    });
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::span<const std::byte> bytes(reinterpret_cast<const std::byte*>(data), size);
  attempt([&] {
    const GgufFile file(bytes, "fuzz");
    read_metadata(file.metadata());
    attempt([&] { static_cast<void>(nb::io::read_tokenizer_spec(file.metadata())); });
    attempt([&] { static_cast<void>(nb::io::read_chat_template(file.metadata())); });
    read_weights(bytes);
  });
  return 0;
}
