// The extension module: registration order and the mapping of errors.
#include "bindings.h"

#include <pybind11/pybind11.h>

#include <new>

#include "base/error.h"

namespace py = pybind11;

namespace {

// Sets a CoreError with its `code`, so that the package can map it to its own classes.
void set_core_error(const py::object& type, nb::ErrorCode code, const char* message) {
  const py::object error = type(py::str(py::bytes(message).attr("decode")("utf-8", "replace")));
  error.attr("code") = nb::to_string(code);
  PyErr_SetObject(type.ptr(), error.ptr());
}

}  // namespace

PYBIND11_MODULE(_core, module) {
  module.doc() = "The compiled core of nanobraid. Use the package, not this module.";
  module.attr("__version__") = NANOBRAID_VERSION;

  static py::object core_error = py::exception<nb::Error>(module, "CoreError");
  core_error.inc_ref();  // outlives the interpreter's teardown of statics
  py::register_local_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const nb::Error& error) {
      set_core_error(core_error, error.code(), error.what());
    } catch (const std::bad_alloc&) {
      set_core_error(core_error, nb::ErrorCode::out_of_memory, "out of memory");
    }
  });

  nb::bindings::bind_system(module);
  nb::bindings::bind_files(module);
  nb::bindings::bind_quant(module);
  nb::bindings::bind_text(module);
  nb::bindings::bind_model(module);
  nb::bindings::bind_engine(module);
  nb::bindings::bind_export(module);
}
