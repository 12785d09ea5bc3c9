// Weight formats: the reference unpacking, for inspection and for tests against other packages. KV formats: what their
// self-test reads and allows.
#include <pybind11/numpy.h>

#include "base/error.h"
#include "bindings.h"
#include "engine/kv_selftest.h"
#include "quant/format.h"
#include "quant/kv_format.h"
#include "text/selftest_text.h"

namespace py = pybind11;

namespace nb::bindings {
namespace {

py::array_t<float> unpack_weights(const std::string& format_name, const py::bytes& data, std::int64_t cols) {
  const quant::Format format = quant::parse_format(format_name);
  NB_CHECK(cols > 0, invalid_argument, "cols must be positive, got ", cols);
  const std::string_view bytes = data;
  const auto row_bytes = static_cast<std::size_t>(quant::row_bytes(format, cols));
  NB_CHECK(bytes.size() % row_bytes == 0, invalid_argument, bytes.size(), " bytes are no whole number of ", format_name,
           " rows of ", row_bytes, " bytes");
  const std::size_t rows = bytes.size() / row_bytes;
  py::array_t<float> out({static_cast<py::ssize_t>(rows), static_cast<py::ssize_t>(cols)});
  for (std::size_t row = 0; row < rows; ++row) {
    quant::unpack_row(format, reinterpret_cast<const std::uint8_t*>(bytes.data()) + row * row_bytes, cols,
                      out.mutable_data(static_cast<py::ssize_t>(row), 0));
  }
  return out;
}

// Most cost of each KV format that has a limit.
py::dict kv_limits() {
  py::dict out;
  for (int i = 0; i < quant::kNumKvFormats; ++i) {
    const quant::KvFormatInfo& info = quant::kv_format_info(static_cast<quant::KvFormat>(i));
    if (info.most_kl > 0.0) out[info.name] = info.most_kl;
  }
  return out;
}

std::string kv_refusal(const std::string& kv_dtype, double cost, const std::string& model, const std::string& force) {
  return engine::kv_refusal(quant::parse_kv_format(kv_dtype), cost, model, force);
}

}  // namespace

void bind_quant(py::module_& module) {
  module.def("selftest_text", &text::selftest_text);
  module.def("kv_limits", &kv_limits);
  module.def("kv_refusal", &kv_refusal, py::arg("kv_dtype"), py::arg("cost"), py::arg("model"), py::arg("force"));
  module.def("unpack_weights", &unpack_weights, py::arg("format"), py::arg("data"), py::arg("cols"));
}

}  // namespace nb::bindings
