// Shared by the binding files: what each registers, and how errors cross into Python.
//
// No logic lives here: convert, release the GIL, call, convert. Called under the GIL.
#pragma once

#include <pybind11/pybind11.h>

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "engine/metrics.h"
#include "engine/request.h"
#include "io/metadata_writer.h"
#include "io/model_source.h"
#include "model/fusion.h"
#include "text/stop_matcher.h"
#include "text/text_stream.h"
#include "text/tokenizer.h"

namespace nb::model {
class Model;
}

namespace nb::engine {
struct KvSelftest;
struct SpeculativeOptions;
struct StepOutput;
}  // namespace nb::engine

namespace nb::bindings {

void bind_system(pybind11::module_& module);
void bind_files(pybind11::module_& module);
void bind_quant(pybind11::module_& module);
void bind_text(pybind11::module_& module);
void bind_model(pybind11::module_& module);
void bind_engine(pybind11::module_& module);
void bind_export(pybind11::module_& module);

/// pybind11 holds classes, not interfaces: an open model file behind one pointer.
struct ModelFile {
  std::shared_ptr<const io::ModelSource> source;
};

/// A tokenizer and the template that stood beside it in the file.
struct FileTokenizer {
  explicit FileTokenizer(const std::string& path);
  /// The same from a GGUF file that is in memory.
  FileTokenizer(std::string_view bytes, std::string name);
  std::shared_ptr<const text::Tokenizer> tokenizer;
  std::optional<std::string> chat_template;
};

/// What ends the text of an answer besides tokens.
struct StopRules {
  std::vector<std::string> stops;
  bool include = false;  ///< the stop string is part of the text
  int min_tokens = 0;    ///< so many tokens pass before anything stops
};

/// Tokens to text, up to a stop string.
class StoppingStream {
 public:
  StoppingStream(std::shared_ptr<const text::Tokenizer> source, bool skip_special, bool at_start, StopRules rules);
  std::string push(TokenId id);
  std::string finish();
  /// The stop string that ended the text, or nullptr.
  const std::string* matched() const { return matcher_.matched(); }

 private:
  std::shared_ptr<const text::Tokenizer> tokenizer_;
  text::TextStream stream_;
  text::StopMatcher matcher_;
  int num_passing_;
};

/// Makes constraints that ask plan.matcher(), a new object for each answer; nothing for None.
std::function<std::unique_ptr<engine::TokenConstraint>()> constraint_maker(const pybind11::object& plan);

/// What they report about themselves, as Python sees it.
pybind11::dict to_dict(const model::FusionPlan& plan);
pybind11::dict to_dict(const engine::EngineStats& stats);
pybind11::dict to_dict(const engine::KvSelftest& found);

pybind11::dict reuse_of(const engine::StepOutput& output);
pybind11::dict metrics_of(const engine::StepOutput& output);

/// (method, num_draft_tokens, prompt_lookup_min, prompt_lookup_max, adaptive), see engine::SpeculativeOptions.
using SpeculativeOption = std::tuple<std::string, int, int, int, bool>;
/// `draft_model`: null where the method has none.
engine::SpeculativeOptions parse_speculative(const SpeculativeOption& option, const model::Model* draft_model);

/// Adds the entries of a dict of bool, int, float, str and lists of one of them; throws invalid_argument naming the
/// key.
void add_metadata(io::MetadataWriter& out, const pybind11::dict& metadata);

/// Bytes from a file as a Python string; what is not UTF-8 becomes U+FFFD.
inline pybind11::str text_or_replacement(std::string_view bytes) {
  return pybind11::reinterpret_steal<pybind11::str>(
      PyUnicode_DecodeUTF8(bytes.data(), static_cast<Py_ssize_t>(bytes.size()), "replace"));
}

}  // namespace nb::bindings
