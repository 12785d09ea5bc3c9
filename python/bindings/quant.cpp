// Weight formats: the reference unpacking, for inspection and for tests against other packages.
#include <pybind11/numpy.h>

#include "base/error.h"
#include "bindings.h"
#include "quant/format.h"

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

}  // namespace

void bind_quant(py::module_& module) {
  module.def("unpack_weights", &unpack_weights, py::arg("format"), py::arg("data"), py::arg("cols"));
}

}  // namespace nb::bindings
