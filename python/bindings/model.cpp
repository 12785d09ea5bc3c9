// Models.
#include <pybind11/stl.h>

#include <chrono>

#include "base/error.h"
#include "bindings.h"
#include "engine/disk_tier.h"
#include "engine/kv_selftest.h"
#include "io/file_digest.h"
#include "io/gguf_tokenizer.h"
#include "loaded_model.h"
#include "model/loader.h"
#include "quant/kv_format.h"

namespace py = pybind11;

namespace nb::bindings {

LoadedModel::LoadedModel(const std::string& path, const std::string& backend, const std::string& dtype, int num_threads,
                         bool deterministic, const std::optional<std::string>& digest_directory,
                         const std::string& fusion, bool measure_fusion,
                         const std::optional<StreamingOption>& streaming) {
  const auto begin = std::chrono::steady_clock::now();
  model::ModelOptions options{
      .backend = backend,
      .dtype = dtype,
      .num_threads = num_threads,
      .deterministic = deterministic,
      .fusion = {.fusion = model::parse_fusion(fusion), .measure = measure_fusion},
  };
  const auto file = io::open_model(path);
  if (digest_directory) content = io::model_digest(*file, *digest_directory);
  if (streaming) {
    NB_CHECK(content.has_value(), invalid_argument, "streaming needs a digest_directory");
    const auto& [budget_bytes, keep_first_k, keep_last_k, prefetch_layers, cache_directory, cache_bytes] = *streaming;
    options.streaming = {budget_bytes,    keep_first_k, keep_last_k, prefetch_layers,
                         cache_directory, *content,     cache_bytes};
  }
  if (file->metadata().has("tokenizer.ggml.model")) eos_ids = io::read_tokenizer(file->metadata())->eos_ids();
  model = model::load_model(*file, options);
  const bool same = !digest_directory || io::model_digest(*io::open_model(path), *digest_directory) == *content;
  NB_CHECK(same, io, path, ": the file was replaced while it was loaded");
  load_seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

namespace {

const char* act_name(ops::ActType type) {
  switch (type) {
    case ops::ActType::f32:
      return "f32";
    case ops::ActType::bf16:
      return "bf16";
    case ops::ActType::int8:
      return "int8";
  }
  return "f32";
}

py::dict config_of(const LoadedModel& self) {
  const model::ModelConfig& config = self.model->config();
  py::dict out;
  out["architecture"] = config.architecture;
  out["name"] = config.name;
  out["num_layers"] = config.num_layers;
  out["hidden_size"] = config.hidden_size;
  out["num_heads"] = config.num_heads;
  out["num_kv_heads"] = config.num_kv_heads;
  out["head_dim"] = config.head_dim;
  out["intermediate_size"] = config.intermediate_size;
  out["vocab_size"] = config.vocab_size;
  out["max_position_embeddings"] = config.max_position_embeddings;
  out["rms_norm_eps"] = config.rms_norm_eps;
  out["rope_theta"] = config.rope.theta;
  out["rope_scaling"] = config.rope.divisors.empty() ? model::to_string(config.rope.scaling) : "divisors";
  out["sliding_window"] = config.sliding_window;
  out["qkv_bias"] = config.qkv_bias;
  out["qk_norm"] = config.qk_norm;
  out["tie_word_embeddings"] = config.tie_word_embeddings;
  return out;
}

// The identity of everything that what the model predicts with this format follows from.
std::string kv_fingerprint_of(const LoadedModel& self, const std::string& kv_dtype) {
  NB_CHECK(self.content.has_value(), invalid_argument, "a fingerprint needs a model with a digest_directory");
  return to_hex(engine::kv_fingerprint(*self.model, quant::parse_kv_format(kv_dtype), *self.content));
}

py::dict measure_kv_format(const LoadedModel& self, const std::string& kv_dtype, const std::vector<TokenId>& text) {
  const auto measured = [&] {
    const py::gil_scoped_release release;
    return engine::measure_kv_format(*self.model, text, quant::parse_kv_format(kv_dtype));
  };
  return to_dict(measured());
}

}  // namespace

void bind_model(py::module_& module) {
  py::class_<LoadedModel, std::shared_ptr<LoadedModel>>(module, "Model")
      .def(py::init<const std::string&, const std::string&, const std::string&, int, bool,
                    const std::optional<std::string>&, const std::string&, bool,
                    const std::optional<StreamingOption>&>(),
           py::arg("path"), py::arg("backend") = "", py::arg("dtype") = "auto", py::arg("num_threads") = 0,
           py::arg("deterministic") = false, py::arg("digest_directory") = py::none(), py::arg("fusion") = "auto",
           py::arg("measure_fusion") = false, py::arg("streaming") = py::none(),
           py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("config", &config_of)
      .def_property_readonly("backend", [](const LoadedModel& self) { return self.model->backend().name; })
      .def_property_readonly("dtype", [](const LoadedModel& self) { return act_name(self.model->act_type()); })
      .def_property_readonly("num_threads", [](const LoadedModel& self) { return self.model->pool().num_threads(); })
      .def_property_readonly("weight_bytes", [](const LoadedModel& self) { return self.model->weights().bytes; })
      .def_property_readonly("expanded", [](const LoadedModel& self) { return self.model->weights().expanded; })
      .def_property_readonly("fusion", [](const LoadedModel& self) { return to_dict(self.model->fusion()); })
      .def("kv_fingerprint", &kv_fingerprint_of, py::arg("kv_dtype"))
      .def("measure_kv_format", &measure_kv_format, py::arg("kv_dtype"), py::arg("text_token_ids"))
      .def_property_readonly("load_seconds", [](const LoadedModel& self) { return self.load_seconds; });
}

}  // namespace nb::bindings
