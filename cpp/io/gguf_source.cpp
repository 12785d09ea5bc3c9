#include "io/gguf_source.h"

#include <utility>
#include <vector>

#include "base/error.h"
#include "io/by_name.h"
#include "io/gguf_format.h"
#include "io/gguf_types.h"
#include "text/unicode.h"

namespace nb::io {
namespace {

std::string refusal(std::uint32_t type, std::string_view tensor) {
  return "tensor " + text::in_quotes(tensor) + " has format " + gguf_tensor_type_name(type) +
         ", which is not offered; there are F32, F16, BF16, Q4_0, Q4_1 and Q8_0";
}

constexpr const char* kSplitCount = "split.count";

std::string_view name_of(const TensorInfo& tensor) { return tensor.name; }

class GgufSource final : public ModelSource {
 public:
  /// The parts of one model, in order.
  explicit GgufSource(std::vector<std::shared_ptr<const GgufFile>> parts) : parts_(std::move(parts)) {
    for (std::size_t part = 0; part < parts_.size(); ++part) add_tensors(static_cast<std::uint32_t>(part));
    const std::int64_t twice = sort_by_name(tensors_, name_of, names_);
    if (twice < 0) return;
    const TensorInfo& tensor = tensors_[static_cast<std::size_t>(twice)];
    fail(ErrorCode::format, parts_[tensor.part]->path(), ": tensor ", text::in_quotes(tensor.name),
         " stands in another part too");  // twice in one part is an error of the parser
  }

  FileKind kind() const override { return FileKind::gguf; }
  std::uint32_t version() const override { return parts_[0]->version(); }
  const Metadata& metadata() const override { return parts_[0]->metadata(); }
  void release_pages() const override {
    for (const auto& part : parts_) part->release_pages();
  }
  const std::vector<TensorInfo>& tensors() const override { return tensors_; }

  std::uint64_t file_bytes() const override {
    std::uint64_t bytes = 0;
    for (const auto& part : parts_) bytes += part->file_bytes();
    return bytes;
  }

  std::vector<std::string> parts() const override {
    std::vector<std::string> paths;
    for (const auto& part : parts_) paths.push_back(part->path());
    return paths;
  }

  const TensorInfo* find(std::string_view name) const override {
    const TensorInfo* tensor = find_by_name(tensors_, name_of, names_, name);
    if (tensor == nullptr) return nullptr;
    const GgufFile& part = *parts_[tensor->part];
    NB_CHECK(tensor->format.has_value(), unsupported, part.path(), ": ", refusal(part.find_tensor(name)->type, name));
    return tensor;
  }

  void read(const TensorInfo& tensor, std::uint64_t offset, std::span<std::byte> out) const override {
    check_inside(tensor, offset, out.size());
    parts_[tensor.part]->read(tensor.offset + offset, out);
  }

 private:
  void add_tensors(std::uint32_t part) {
    for (const GgufTensor& tensor : parts_[part]->tensors()) {
      tensors_.push_back({.name = std::string(tensor.name),
                          .format = to_format(tensor.type),
                          .format_name = gguf_tensor_type_name(tensor.type),
                          .shape = {tensor.dims.rbegin(), tensor.dims.rend()},
                          .bytes = tensor.bytes,
                          .offset = tensor.offset,
                          .part = part});
    }
  }

  std::vector<std::shared_ptr<const GgufFile>> parts_;
  std::vector<TensorInfo> tensors_;   // of the first part, then of the second, ...
  std::vector<std::uint32_t> names_;  // indices of tensors_ in order of name
};

// ---- the parts of a split model ----

// "-00002-of-00003.gguf"
std::string part_ending(std::uint64_t number, std::uint64_t count) {
  const auto digits = [](std::uint64_t value) {
    const std::string text = std::to_string(value);
    return std::string(text.size() < 5 ? 5 - text.size() : 0, '0') + text;
  };
  return "-" + digits(number) + "-of-" + digits(count) + ".gguf";
}

// What a part says about itself; `number` counts from 1, as in names.
struct PartFacts {
  std::uint64_t number, count, num_tensors;
};

PartFacts part_facts(const GgufFile& file) {
  const Metadata& metadata = file.metadata();
  const PartFacts facts{metadata.u64("split.no") + 1, metadata.u64(kSplitCount), metadata.u64("split.tensors.count")};
  constexpr std::uint64_t kMostParts = 65535;  // the keys are u16
  NB_CHECK(facts.count <= kMostParts, format, file.path(), ": key ", kSplitCount, " is ", facts.count, ", more than ",
           kMostParts);
  NB_CHECK(facts.number >= 1 && facts.number <= facts.count, format, file.path(), ": key split.no is ",
           facts.number - 1, ", but the model has ", facts.count, " parts, counted from 0");
  return facts;
}

// Refuses a part that is not number `number` of the model that `first` begins.
void check_part(const GgufFile& part, std::uint64_t number, const GgufFile& first) {
  const PartFacts found = part_facts(part), wanted = part_facts(first);
  NB_CHECK(found.number == number && found.count == wanted.count, format, part.path(), ": is part ", found.number,
           " of ", found.count, " by its metadata, but part ", number, " of ", wanted.count, " by its name");
  NB_CHECK(found.num_tensors == wanted.num_tensors, format, part.path(), ": is part of a model of ", found.num_tensors,
           " tensors, but ", first.path(), " of one of ", wanted.num_tensors);
  for (const char* key : {"general.architecture", "general.name"}) {
    if (!part.metadata().has(key) || !first.metadata().has(key)) continue;
    const std::string_view theirs = part.metadata().string(key), ours = first.metadata().string(key);
    NB_CHECK(theirs == ours, format, part.path(), ": key ", key, " is ", text::in_quotes(theirs), ", but in ",
             first.path(), " it is ", text::in_quotes(ours), ": they are parts of different models");
  }
}

std::shared_ptr<const GgufFile> open_part(const std::string& path, std::uint64_t number, std::uint64_t count,
                                          const std::string& opened) {
  try {
    return std::make_shared<const GgufFile>(path);
  } catch (const Error& error) {
    if (error.code() != ErrorCode::io) throw;
    fail(ErrorCode::io, error.what(), " (part ", number, " of ", count, " of the model that ", opened, " belongs to)");
  }
}

std::shared_ptr<const ModelSource> open_split(std::shared_ptr<const GgufFile> opened) {
  const PartFacts facts = part_facts(*opened);
  const std::string& path = opened->path();
  const std::string ending = part_ending(facts.number, facts.count);
  NB_CHECK(path.size() >= ending.size() && path.compare(path.size() - ending.size(), ending.size(), ending) == 0,
           format, path, ": is part ", facts.number, " of ", facts.count,
           " of a split model; for the other parts to be found its name must end in ", ending);
  const std::string stem = path.substr(0, path.size() - ending.size());
  std::vector<std::shared_ptr<const GgufFile>> parts;
  std::uint64_t num_tensors = 0;
  for (std::uint64_t number = 1; number <= facts.count; ++number) {
    const std::string part_path = stem + part_ending(number, facts.count);
    parts.push_back(number == facts.number ? opened : open_part(part_path, number, facts.count, path));
    check_part(*parts.back(), number, *parts.front());
    num_tensors += parts.back()->tensors().size();
  }
  const std::uint64_t expected = part_facts(*parts.front()).num_tensors;
  NB_CHECK(num_tensors == expected, format, parts.front()->path(), ": the ", facts.count, " parts hold ", num_tensors,
           " tensors, but key split.tensors.count is ", expected);
  return std::make_shared<const GgufSource>(std::move(parts));
}

}  // namespace

quant::Format format_of_gguf_type(std::uint32_t type, std::string_view tensor) {
  const std::optional<quant::Format> format = to_format(type);
  NB_CHECK(format.has_value(), unsupported, refusal(type, tensor));
  return *format;
}

std::shared_ptr<const ModelSource> open_gguf(std::shared_ptr<const GgufFile> file) {
  const std::uint64_t parts = file->metadata().u64(kSplitCount, 1);
  NB_CHECK(parts <= 1, unsupported, file->path(), ": is one of the ", parts, " parts of a split model");
  return std::make_shared<const GgufSource>(std::vector{std::move(file)});
}

std::shared_ptr<const ModelSource> open_gguf(const std::string& path) {
  auto file = std::make_shared<const GgufFile>(path);
  if (file->metadata().u64(kSplitCount, 1) > 1) return open_split(std::move(file));
  return open_gguf(std::move(file));
}

}  // namespace nb::io
