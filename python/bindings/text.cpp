// Tokenizer and streaming detokenizer.
#include <pybind11/stl.h>

#include <span>
#include <utility>

#include "bindings.h"
#include "io/gguf_file.h"
#include "io/gguf_tokenizer.h"

namespace py = pybind11;

namespace nb::bindings {

FileTokenizer::FileTokenizer(const std::string& path) {
  const auto file = io::open_model(path);
  tokenizer = io::read_tokenizer(file->metadata());
  chat_template = io::read_chat_template(file->metadata());
}

FileTokenizer::FileTokenizer(std::string_view bytes, std::string name) {
  const io::GgufFile file(std::as_bytes(std::span(bytes)), std::move(name));
  tokenizer = io::read_tokenizer(file.metadata());
  chat_template = io::read_chat_template(file.metadata());
}

StoppingStream::StoppingStream(std::shared_ptr<const text::Tokenizer> source, bool skip_special, bool at_start,
                               StopRules rules)
    : tokenizer_(std::move(source)),
      stream_(*tokenizer_, skip_special, at_start),
      matcher_(std::move(rules.stops), rules.include),
      num_passing_(rules.min_tokens) {}

std::string StoppingStream::push(TokenId id) {
  const std::string text = stream_.push(id);
  // The token with which the least number is reached may stop already.
  return num_passing_ > 0 && --num_passing_ > 0 ? matcher_.pass(text) : matcher_.push(text);
}

std::string StoppingStream::finish() {
  std::string text = matcher_.pass(stream_.finish());
  return text + matcher_.finish();
}

namespace {

std::optional<TokenId> id_or_none(TokenId id) { return id >= 0 ? std::optional(id) : std::nullopt; }

std::vector<TokenId> encode(const FileTokenizer& self, const std::string& source, bool add_special, bool parse_special,
                            bool at_start) {
  const py::gil_scoped_release release;
  return self.tokenizer->encode(source, add_special, parse_special,
                                at_start ? text::TextPlace::start : text::TextPlace::after_token);
}

// How many characters of UTF-8 text begin before each of a run of ascending byte positions.
class CharCounter {
 public:
  explicit CharCounter(std::string_view text) : text_(text) {}
  std::size_t before(std::size_t position) {
    for (; position_ < position; ++position_) {
      if ((static_cast<unsigned char>(text_[position_]) & 0xC0) != 0x80) ++count_;
    }
    return count_;
  }

 private:
  std::string_view text_;
  std::size_t position_ = 0;
  std::size_t count_ = 0;
};

// Ids, and the characters [first, second) each comes from: all characters that it has a byte of.
std::pair<std::vector<TokenId>, std::vector<std::pair<std::size_t, std::size_t>>> encode_with_offsets(
    const FileTokenizer& self, const std::string& source, bool add_special, bool parse_special) {
  const py::gil_scoped_release release;
  text::Encoding encoding = self.tokenizer->encode_with_spans(source, add_special, parse_special);
  std::vector<std::pair<std::size_t, std::size_t>> offsets;
  offsets.reserve(encoding.spans.size());
  CharCounter begins(source);
  CharCounter ends(source);
  for (const text::TextSpan& span : encoding.spans) {
    if (span.begin == 0 && span.end == 0) {
      offsets.emplace_back(0, 0);
      continue;
    }
    // The character that the first byte belongs to begins at or before it.
    const std::size_t first = begins.before(span.begin < source.size() ? span.begin + 1 : span.begin);
    const std::size_t begin = span.begin < source.size() ? first - 1 : first;
    offsets.emplace_back(begin, span.end > span.begin ? ends.before(span.end) : begin);
  }
  return {std::move(encoding.ids), std::move(offsets)};
}

std::string decode(const FileTokenizer& self, const std::vector<TokenId>& ids, bool skip_special) {
  const py::gil_scoped_release release;
  return self.tokenizer->decode(ids, skip_special);
}

py::list token_bytes(const FileTokenizer& self) {
  py::list out;
  for (TokenId id = 0; id < self.tokenizer->vocab_size(); ++id) {
    const std::string_view bytes = self.tokenizer->token_bytes(id);
    out.append(self.tokenizer->is_special(id) ? py::object(py::none()) : py::bytes(bytes.data(), bytes.size()));
  }
  return out;
}

py::dict special_tokens(const FileTokenizer& self) {
  py::dict out;
  for (TokenId id = 0; id < self.tokenizer->vocab_size(); ++id) {
    if (self.tokenizer->is_special(id)) out[text_or_replacement(self.tokenizer->token_text(id))] = id;
  }
  return out;
}

}  // namespace

void bind_text(py::module_& module) {
  py::class_<StoppingStream>(module, "TextStream")
      .def("push", &StoppingStream::push, py::arg("token_id"))
      .def("finish", &StoppingStream::finish)
      .def_property_readonly("stop_reason", [](const StoppingStream& self) {
        return self.matched() != nullptr ? py::object(py::str(*self.matched())) : py::none();
      });

  py::class_<FileTokenizer>(module, "Tokenizer")
      .def(py::init<const std::string&>(), py::arg("path"), py::call_guard<py::gil_scoped_release>())
      .def_static(
          "from_gguf",
          [](const py::bytes& data, const std::string& name) {
            const std::string_view view = data;
            const py::gil_scoped_release release;
            return std::make_unique<FileTokenizer>(view, name);
          },
          py::arg("data"), py::arg("name"))
      .def_property_readonly("vocab_size", [](const FileTokenizer& self) { return self.tokenizer->vocab_size(); })
      .def_property_readonly("bos_token_id",
                             [](const FileTokenizer& self) { return id_or_none(self.tokenizer->bos()); })
      .def_property_readonly("eos_token_ids", [](const FileTokenizer& self) { return self.tokenizer->eos_ids(); })
      .def_property_readonly("chat_template", [](const FileTokenizer& self) { return self.chat_template; })
      .def_property_readonly("add_bos", [](const FileTokenizer& self) { return self.tokenizer->adds_bos(); })
      .def_property_readonly("special_tokens", &special_tokens)
      .def("token_bytes", &token_bytes)
      .def("encode", &encode, py::arg("text"), py::arg("add_special_tokens") = true, py::arg("parse_special") = false,
           py::arg("at_start") = true)
      .def("encode_with_offsets", &encode_with_offsets, py::arg("text"), py::arg("add_special_tokens") = true,
           py::arg("parse_special") = false)
      .def("decode", &decode, py::arg("token_ids"), py::arg("skip_special_tokens") = true)
      .def(
          "token_text",
          [](const FileTokenizer& self, TokenId id) { return text_or_replacement(self.tokenizer->token_text(id)); },
          py::arg("token_id"))
      .def(
          "find_token",
          [](const FileTokenizer& self, const std::string& spelled) { return self.tokenizer->find_token(spelled); },
          py::arg("text"))
      .def(
          "stream",
          [](const FileTokenizer& self, bool skip_special, bool at_start, std::vector<std::string> stop,
             bool include_stop, int min_tokens) {
            return std::make_unique<StoppingStream>(
                self.tokenizer, skip_special, at_start,
                StopRules{.stops = std::move(stop), .include = include_stop, .min_tokens = min_tokens});
          },
          py::arg("skip_special_tokens") = true, py::arg("at_start") = true,
          py::arg("stop") = std::vector<std::string>{}, py::arg("include_stop") = false, py::arg("min_tokens") = 0);
}

}  // namespace nb::bindings
