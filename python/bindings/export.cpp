// What an export needs of the core: safetensors files, statistics of a text, packing with a search.
#include <pybind11/functional.h>
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <map>
#include <utility>

#include "base/error.h"
#include "bindings.h"
#include "io/gguf_tokenizer.h"
#include "io/safetensors.h"
#include "io/safetensors_source.h"
#include "model/calibration.h"
#include "model/read_config.h"
#include "quant/quantize.h"
#include "text/tokenizer.h"

namespace py = pybind11;

namespace nb::bindings {
namespace {

using FloatArray = py::array_t<float, py::array::c_style | py::array::forcecast>;
using NameTuple = std::tuple<std::string, std::size_t, std::string>;
// Name, scheme, group size, and of each part ("codes", "scales", "zeros", "groups") its file and name.
using MatrixTuple =
    std::tuple<std::string, std::string, std::int64_t, std::map<std::string, std::pair<std::size_t, std::string>>>;

int threads_or_default(int num_threads) { return num_threads > 0 ? num_threads : ThreadPool::default_num_threads(); }

py::list list_safetensors(const std::string& path) {
  const io::SafetensorsFile file(path);
  py::list out;
  for (const io::SafetensorsTensor& tensor : file.tensors()) {
    out.append(py::make_tuple(tensor.name, tensor.dtype, tensor.shape, tensor.bytes));
  }
  return out;
}

ModelFile open_safetensors(const std::string& path, const std::vector<std::string>& files,
                           const std::vector<NameTuple>& tensors, const py::dict& metadata,
                           const std::vector<MatrixTuple>& matrices) {
  io::MetadataWriter entries;
  add_metadata(entries, metadata);
  std::vector<io::SafetensorsName> names;
  for (const auto& [name, file, stored_name] : tensors) names.push_back({name, file, stored_name});
  std::vector<io::CheckpointMatrixName> checkpoint;
  for (const auto& [name, scheme, group_size, parts] : matrices) {
    io::CheckpointMatrixName item;
    item.name = name;
    item.scheme = scheme;
    item.group_size = group_size;
    for (const auto& [what, place] : parts) {
      io::CheckpointPart* const part = what == "codes"    ? &item.codes
                                       : what == "scales" ? &item.scales
                                       : what == "zeros"  ? &item.zeros
                                       : what == "groups" ? &item.groups
                                                          : nullptr;
      NB_CHECK(part != nullptr, invalid_argument, "part '", what, "', expected codes, scales, zeros or groups");
      *part = {place.first, place.second};
    }
    checkpoint.push_back(std::move(item));
  }
  const py::gil_scoped_release release;
  return {io::open_safetensors(path, files, names, entries, checkpoint)};
}

std::vector<TokenId> encode_text(const ModelFile& file, const std::string& text) {
  const py::gil_scoped_release release;
  return io::read_tokenizer(file.source->metadata())->encode(text);
}

void check_model(const ModelFile& file) {
  const py::gil_scoped_release release;
  static_cast<void>(model::read_config(*file.source));
}

py::array_t<float> array_of(const std::vector<float>& values) {
  return py::array_t<float>(static_cast<py::ssize_t>(values.size()), values.data());
}

py::tuple measure_inputs(const ModelFile& file, const std::vector<TokenId>& token_ids, int sequence_len,
                         int num_threads, std::optional<std::function<void(std::uint64_t, std::uint64_t)>> progress) {
  model::InputStatistics statistics;
  {
    const py::gil_scoped_release release;
    ThreadPool pool(threads_or_default(num_threads));
    io::ProgressFunction tell;
    if (progress) {
      tell = [&](std::uint64_t done, std::uint64_t all) {
        const py::gil_scoped_acquire gil;
        (*progress)(done, all);
      };
    }
    statistics = model::measure_inputs(*file.source, token_ids, sequence_len, ops::find_backend("cpu"), pool, tell);
  }
  py::list layers;
  for (const model::LayerStatistics& layer : statistics.layers) {
    py::dict columns;
    columns["qkv"] = array_of(layer.qkv);
    columns["attention_out"] = array_of(layer.attention_out);
    columns["gate_up"] = array_of(layer.gate_up);
    columns["down"] = array_of(layer.down);
    layers.append(columns);
  }
  return py::make_tuple(layers, array_of(statistics.head));
}

void check_matrix(const FloatArray& rows) {
  NB_CHECK(rows.ndim() == 2, invalid_argument, "expected a matrix of weights, got ", rows.ndim(), " dimensions");
}

py::bytes quantize(const std::string& format_name, const FloatArray& rows, const std::optional<FloatArray>& importance,
                   int num_threads) {
  check_matrix(rows);
  const quant::Format format = quant::parse_format(format_name);
  const std::int64_t num_rows = rows.shape(0), num_cols = rows.shape(1);
  NB_CHECK(!importance || (importance->ndim() == 1 && importance->shape(0) == num_cols), invalid_argument,
           "importance has ", importance ? importance->size() : 0, " values, the rows have ", num_cols);
  PyObject* raw = PyBytes_FromStringAndSize(nullptr, num_rows * quant::row_bytes(format, num_cols));
  if (raw == nullptr) throw py::error_already_set();
  auto out = py::reinterpret_steal<py::bytes>(raw);
  auto* const bytes = reinterpret_cast<std::uint8_t*>(PyBytes_AS_STRING(raw));
  const float* const columns = importance ? importance->data() : nullptr;
  const float* const values = rows.data();
  const py::gil_scoped_release release;
  ThreadPool pool(threads_or_default(num_threads));
  quant::quantize_rows(format, values, num_rows, num_cols, columns, bytes, pool);
  return out;
}

std::pair<double, double> packing_error(const std::string& format_name, const FloatArray& rows, const py::bytes& packed,
                                        int num_threads) {
  check_matrix(rows);
  const quant::Format format = quant::parse_format(format_name);
  const std::int64_t num_rows = rows.shape(0), num_cols = rows.shape(1);
  const std::string_view bytes = packed;
  NB_CHECK(static_cast<std::int64_t>(bytes.size()) == num_rows * quant::row_bytes(format, num_cols), invalid_argument,
           bytes.size(), " bytes are not [", num_rows, ", ", num_cols, "] weights of ", format_name);
  const float* const values = rows.data();
  const py::gil_scoped_release release;
  ThreadPool pool(threads_or_default(num_threads));
  const quant::PackingError error = quant::packing_error(
      format, values, reinterpret_cast<const std::uint8_t*>(bytes.data()), num_rows, num_cols, pool);
  return {error.squared_error, error.squared_norm};
}

}  // namespace

void bind_export(py::module_& module) {
  module.def("list_safetensors", &list_safetensors, py::arg("path"));
  module.def("open_safetensors", &open_safetensors, py::arg("path"), py::arg("files"), py::arg("tensors"),
             py::arg("metadata"), py::arg("matrices") = std::vector<MatrixTuple>{});
  module.def("check_model", &check_model, py::arg("file"));
  module.def("encode_text", &encode_text, py::arg("file"), py::arg("text"));
  module.def("measure_inputs", &measure_inputs, py::arg("file"), py::arg("token_ids"), py::arg("sequence_len"),
             py::arg("num_threads") = 0, py::arg("progress") = py::none());
  module.def("quantize", &quantize, py::arg("format"), py::arg("rows"), py::arg("importance") = py::none(),
             py::arg("num_threads") = 0);
  module.def("packing_error", &packing_error, py::arg("format"), py::arg("rows"), py::arg("packed"),
             py::arg("num_threads") = 0);
}

}  // namespace nb::bindings
