// Model files: reading either kind, and writing .braid.
#include <pybind11/functional.h>
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

#include "base/error.h"
#include "bindings.h"
#include "io/braid_writer.h"
#include "io/bytes.h"
#include "io/tensor_rows.h"
#include "io/weight_check.h"
#include "text/unicode.h"

namespace py = pybind11;

namespace nb::bindings {
namespace {

// ---- metadata to Python ----

// Bytes that are not UTF-8 become lone surrogates, so that text_bytes() can give them back.
py::str text_of(std::string_view bytes) {
  return py::reinterpret_steal<py::str>(
      PyUnicode_DecodeUTF8(bytes.data(), static_cast<Py_ssize_t>(bytes.size()), "surrogateescape"));
}

py::object scalar_of(io::ValueType type, const std::byte* at) {
  switch (type) {
    case io::ValueType::u8:
      return py::int_(io::load<std::uint8_t>(at));
    case io::ValueType::i8:
      return py::int_(io::load<std::int8_t>(at));
    case io::ValueType::u16:
      return py::int_(io::load<std::uint16_t>(at));
    case io::ValueType::i16:
      return py::int_(io::load<std::int16_t>(at));
    case io::ValueType::u32:
      return py::int_(io::load<std::uint32_t>(at));
    case io::ValueType::i32:
      return py::int_(io::load<std::int32_t>(at));
    case io::ValueType::f32:
      return py::float_(io::load<float>(at));
    case io::ValueType::boolean:
      return py::bool_(*at != std::byte{0});
    case io::ValueType::u64:
      return py::int_(io::load<std::uint64_t>(at));
    case io::ValueType::i64:
      return py::int_(io::load<std::int64_t>(at));
    case io::ValueType::f64:
      return py::float_(io::load<double>(at));
    case io::ValueType::string:
    case io::ValueType::array:
      break;
  }
  fail(ErrorCode::internal, "not a scalar: ", io::to_string(type));
}

py::object value_of(const io::MetadataValue& value) {
  if (value.type == io::ValueType::string) return text_of(io::as_text(value.bytes));
  if (value.type != io::ValueType::array) return scalar_of(value.type, value.bytes.data());
  py::list items(value.count);
  io::StringCursor strings(value);
  const std::size_t stride = io::value_type_bytes(value.element_type);
  for (std::size_t i = 0; i < value.count; ++i) {
    if (std::string_view text; value.element_type == io::ValueType::string) {
      strings.next(text);
      items[i] = text_of(text);
    } else {
      items[i] = scalar_of(value.element_type, value.bytes.data() + i * stride);
    }
  }
  return items;
}

// ---- metadata from Python ----

std::string text_bytes(const std::string& key, py::handle text) {
  PyObject* encoded = PyUnicode_AsEncodedString(text.ptr(), "utf-8", "surrogateescape");
  if (encoded == nullptr) {
    PyErr_Clear();
    fail(ErrorCode::invalid_argument, "key ", text::in_quotes(key), " has a text that is not UTF-8");
  }
  return py::reinterpret_steal<py::bytes>(encoded);
}

float to_float(const std::string& key, py::handle value) {
  const double wide = py::cast<double>(value);
  const auto narrow = static_cast<float>(wide);
  NB_CHECK(std::isfinite(narrow) || !std::isfinite(wide), invalid_argument, "key ", text::in_quotes(key), " is ", wide,
           ", which does not fit f32");
  return narrow;
}

// Integers of one entry, in the narrowest of u32, i64 and u64 that holds them all.
struct Integers {
  std::vector<std::int64_t> signed_values;
  std::vector<std::uint64_t> unsigned_values;
  bool fit_u32 = true, fit_i64 = true, fit_u64 = true;

  void add(const std::string& key, py::handle value) {
    int overflow = 0;
    const long long narrow = PyLong_AsLongLongAndOverflow(value.ptr(), &overflow);
    std::uint64_t wide = static_cast<std::uint64_t>(narrow);
    if (overflow > 0) wide = PyLong_AsUnsignedLongLong(value.ptr());
    if (overflow < 0 || PyErr_Occurred() != nullptr) {
      PyErr_Clear();
      fail(ErrorCode::invalid_argument, "key ", text::in_quotes(key), " has an integer that does not fit 64 bits");
    }
    fit_i64 = fit_i64 && overflow == 0;
    fit_u64 = fit_u64 && (overflow > 0 || narrow >= 0);
    fit_u32 = fit_u32 && fit_u64 && wide <= std::numeric_limits<std::uint32_t>::max();
    signed_values.push_back(narrow);
    unsigned_values.push_back(wide);
  }

  void check(const std::string& key) const {
    NB_CHECK(fit_i64 || fit_u64, invalid_argument, "key ", text::in_quotes(key),
             " has integers that fit neither i64 nor u64 together");
  }
};

void add_integer(io::MetadataWriter& out, const std::string& key, py::handle value) {
  Integers one;
  one.add(key, value);
  if (one.fit_u32) return out.u32(key, static_cast<std::uint32_t>(one.unsigned_values[0]));
  return one.fit_i64 ? out.i64(key, one.signed_values[0]) : out.u64(key, one.unsigned_values[0]);
}

void add_integers(io::MetadataWriter& out, const std::string& key, const py::sequence& values) {
  Integers all;
  for (const py::handle value : values) all.add(key, value);
  all.check(key);
  if (all.fit_u32) {
    return out.u32s(key, std::vector<std::uint32_t>(all.unsigned_values.begin(), all.unsigned_values.end()));
  }
  return all.fit_i64 ? out.i64s(key, all.signed_values) : out.u64s(key, all.unsigned_values);
}

enum class Kind { boolean, integer, real, text, other };

Kind kind_of(py::handle value) {
  if (PyBool_Check(value.ptr())) return Kind::boolean;
  if (PyLong_Check(value.ptr())) return Kind::integer;
  if (PyFloat_Check(value.ptr())) return Kind::real;
  return PyUnicode_Check(value.ptr()) ? Kind::text : Kind::other;
}

std::string type_name(py::handle value) { return py::str(py::type::of(value).attr("__name__")); }

template <class T, class Function>
std::vector<T> collect(const py::sequence& values, const Function& function) {
  std::vector<T> out;
  out.reserve(values.size());
  for (const py::handle value : values) out.push_back(static_cast<T>(function(value)));
  return out;
}

void add_list(io::MetadataWriter& out, const std::string& key, const py::sequence& values) {
  const Kind kind = values.size() > 0 ? kind_of(values[0]) : Kind::integer;
  for (const py::handle value : values) {
    NB_CHECK(kind_of(value) == kind, invalid_argument, "key ", text::in_quotes(key),
             " has a list of values of several types");
  }
  switch (kind) {
    case Kind::boolean:
      return out.booleans(key, collect<std::uint8_t>(values, [](py::handle value) { return value.cast<bool>(); }));
    case Kind::integer:
      return add_integers(out, key, values);
    case Kind::real:
      return out.f32s(key, collect<float>(values, [&](py::handle value) { return to_float(key, value); }));
    case Kind::text:
      return out.strings(key, collect<std::string>(values, [&](py::handle value) { return text_bytes(key, value); }));
    case Kind::other:
      fail(ErrorCode::invalid_argument, "key ", text::in_quotes(key),
           " has a list of something else than bool, int, float or str");
  }
}

void add_value(io::MetadataWriter& out, const std::string& key, py::handle value) {
  switch (kind_of(value)) {
    case Kind::boolean:
      return out.boolean(key, value.cast<bool>());
    case Kind::integer:
      return add_integer(out, key, value);
    case Kind::real:
      return out.f32(key, to_float(key, value));
    case Kind::text:
      return out.string(key, text_bytes(key, value));
    case Kind::other:
      break;
  }
  if (py::isinstance<py::list>(value) || py::isinstance<py::tuple>(value)) {
    return add_list(out, key, py::reinterpret_borrow<py::sequence>(value));
  }
  fail(ErrorCode::invalid_argument, "key ", text::in_quotes(key), " is a ", type_name(value),
       ", expected bool, int, float, str or a list");
}

}  // namespace

void add_metadata(io::MetadataWriter& out, const py::dict& metadata) {
  for (const auto& [key, value] : metadata) {
    NB_CHECK(kind_of(key) == Kind::text, invalid_argument, "a metadata key is of type ", type_name(key),
             ", expected str");
    add_value(out, text_bytes("", key), value);
  }
}

namespace {

// ---- the classes ----

using TensorTuple = std::tuple<std::string, std::string, std::vector<std::int64_t>>;

std::unique_ptr<io::BraidWriter> make_writer(const std::string& path, const py::dict& metadata,
                                             const std::vector<TensorTuple>& tensors) {
  io::MetadataWriter entries;
  add_metadata(entries, metadata);
  std::vector<io::BraidTensorSpec> specs;
  for (const auto& [name, format, shape] : tensors) specs.push_back({name, quant::parse_format(format), shape});
  const py::gil_scoped_release release;
  return std::make_unique<io::BraidWriter>(path, entries, std::move(specs));
}

// A view of any object with contiguous bytes, for as long as it lives.
class BytesView {
 public:
  explicit BytesView(const py::buffer& object) {
    if (PyObject_GetBuffer(object.ptr(), &view_, PyBUF_SIMPLE) != 0) throw py::error_already_set();
  }
  ~BytesView() { PyBuffer_Release(&view_); }
  BytesView(const BytesView&) = delete;
  BytesView& operator=(const BytesView&) = delete;

  std::span<const std::byte> bytes() const {
    return {static_cast<const std::byte*>(view_.buf), static_cast<std::size_t>(view_.len)};
  }

 private:
  Py_buffer view_{};
};

void write(io::BraidWriter& self, std::size_t index, const py::buffer& data) {
  const BytesView view(data);
  const py::gil_scoped_release release;
  self.write(index, view.bytes());
}

// A block left without an exception is complete; one left with an exception leaves nothing.
void exit_writer(io::BraidWriter& self, const py::object& type, const py::object&, const py::object&) {
  const bool has_failed = !type.is_none();
  const py::gil_scoped_release release;
  if (has_failed) return self.abandon();
  if (self.is_finished()) return;
  try {
    self.finish();
  } catch (...) {
    self.abandon();
    throw;
  }
}

const io::TensorInfo& find_raw(const io::ModelSource& file, const std::string& name) {
  for (const io::TensorInfo& tensor : file.tensors()) {
    if (tensor.name == name) return tensor;
  }
  fail(ErrorCode::invalid_argument, file.path(), ": there is no tensor ", text::in_quotes(name));
}

py::dict metadata_of(const io::ModelSource& file) {
  py::dict out;
  for (const auto& [key, value] : file.metadata().entries()) out[text_of(key)] = value_of(value);
  return out;
}

py::list tensors_of(const io::ModelSource& file) {
  py::list out;
  for (const io::TensorInfo& tensor : file.tensors()) {
    const std::string format = tensor.format ? quant::to_string(*tensor.format) : tensor.format_name;
    out.append(py::make_tuple(text_or_replacement(tensor.name), format, tensor.shape, tensor.bytes));
  }
  return out;
}

py::bytes read_bytes(const io::ModelSource& file, const std::string& name, std::uint64_t offset,
                     std::optional<std::uint64_t> num_bytes) {
  const io::TensorInfo& tensor = find_raw(file, name);
  const std::uint64_t rest = tensor.bytes - std::min(offset, tensor.bytes);
  NB_CHECK(offset <= tensor.bytes && num_bytes.value_or(rest) <= rest, invalid_argument, file.path(), ": ",
           num_bytes.value_or(rest), " bytes at offset ", offset, " are outside tensor ", text::in_quotes(name), " of ",
           tensor.bytes, " bytes");
  PyObject* raw = PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(num_bytes.value_or(rest)));
  if (raw == nullptr) throw py::error_already_set();
  auto out = py::reinterpret_steal<py::bytes>(raw);
  const std::span<std::byte> bytes(reinterpret_cast<std::byte*>(PyBytes_AS_STRING(raw)), num_bytes.value_or(rest));
  const py::gil_scoped_release release;
  file.read(tensor, offset, bytes);
  return out;
}

py::array_t<float> read_rows(const io::ModelSource& file, const std::string& name, std::int64_t row_begin,
                             std::optional<std::int64_t> num_rows) {
  const io::TensorInfo& tensor = find_raw(file, name);
  const std::int64_t rows = io::num_rows(tensor),
                     count = num_rows.value_or(std::max<std::int64_t>(rows - row_begin, 0));
  NB_CHECK(row_begin >= 0 && count >= 0 && row_begin <= rows && count <= rows - row_begin, invalid_argument,
           file.path(), ": ", count, " rows from ", row_begin, " on are outside tensor ", text::in_quotes(name),
           ", which has ", rows);
  py::array_t<float> out({count, io::row_length(tensor)});
  float* values = out.mutable_data();
  const py::gil_scoped_release release;
  io::read_rows(file, tensor, row_begin, count, values);
  return out;
}

// The progress function takes the GIL itself.
py::tuple weights_checked(const io::ModelSource& file, const io::ProgressFunction& progress) {
  io::WeightCheck check;
  {
    const py::gil_scoped_release release;
    check = io::check_weights(file, progress);
  }
  py::list nonfinite, skipped;
  for (const io::NonfiniteTensor& tensor : check.nonfinite) {
    nonfinite.append(py::make_tuple(text_or_replacement(tensor.name), tensor.num_nan, tensor.num_infinite));
  }
  for (const io::TensorInfo& tensor : check.skipped) {
    skipped.append(py::make_tuple(text_or_replacement(tensor.name), tensor.format_name));
  }
  return py::make_tuple(nonfinite, skipped);
}

}  // namespace

void bind_files(py::module_& module) {
  py::class_<io::BraidWriter>(module, "BraidWriter")
      .def(py::init(&make_writer), py::arg("path"), py::arg("metadata"), py::arg("tensors"))
      .def("write", &write, py::arg("index"), py::arg("data"))
      .def("finish", &io::BraidWriter::finish, py::call_guard<py::gil_scoped_release>())
      .def("__enter__", [](io::BraidWriter& self) -> io::BraidWriter& { return self; })
      .def("__exit__", &exit_writer, py::arg("exc_type"), py::arg("exc_value"), py::arg("traceback"))
      .def_property_readonly("path", &io::BraidWriter::path)
      .def_property_readonly("file_bytes", &io::BraidWriter::file_bytes);

  py::class_<ModelFile>(module, "ModelFile")
      .def(py::init([](const std::string& path) { return ModelFile{io::open_model(path)}; }), py::arg("path"),
           py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("path", [](const ModelFile& self) { return self.source->path(); })
      .def_property_readonly("kind", [](const ModelFile& self) { return io::to_string(self.source->kind()); })
      .def_property_readonly("version", [](const ModelFile& self) { return self.source->version(); })
      .def_property_readonly("file_bytes", [](const ModelFile& self) { return self.source->file_bytes(); })
      .def_property_readonly("fingerprint", [](const ModelFile& self) { return self.source->fingerprint(); })
      .def(
          "verify",
          [](const ModelFile& self, const io::ProgressFunction& progress) { return self.source->verify(progress); },
          py::arg("progress") = py::none(), py::call_guard<py::gil_scoped_release>())
      .def(
          "check_weights",
          [](const ModelFile& self, const io::ProgressFunction& progress) {
            return weights_checked(*self.source, progress);
          },
          py::arg("progress") = py::none())
      .def("metadata", [](const ModelFile& self) { return metadata_of(*self.source); })
      .def("tensors", [](const ModelFile& self) { return tensors_of(*self.source); })
      .def(
          "read",
          [](const ModelFile& self, const std::string& name, std::uint64_t offset,
             std::optional<std::uint64_t> nbytes) { return read_bytes(*self.source, name, offset, nbytes); },
          py::arg("name"), py::arg("offset") = 0, py::arg("nbytes") = py::none())
      .def(
          "read_rows",
          [](const ModelFile& self, const std::string& name, std::int64_t row_begin,
             std::optional<std::int64_t> num_rows) { return read_rows(*self.source, name, row_begin, num_rows); },
          py::arg("name"), py::arg("row_begin") = 0, py::arg("num_rows") = py::none());
}

}  // namespace nb::bindings
