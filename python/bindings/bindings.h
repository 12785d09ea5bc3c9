// Shared by the binding files: what each registers, and how errors cross into Python.
//
// No logic lives here: convert, release the GIL, call, convert. Called under the GIL.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <string>
#include <string_view>

#include "io/metadata_writer.h"
#include "io/model_source.h"

namespace nb::bindings {

void bind_system(pybind11::module_& module);
void bind_files(pybind11::module_& module);
void bind_quant(pybind11::module_& module);
void bind_text(pybind11::module_& module);
void bind_engine(pybind11::module_& module);
void bind_export(pybind11::module_& module);

/// pybind11 holds classes, not interfaces: an open model file behind one pointer.
struct ModelFile {
  std::shared_ptr<const io::ModelSource> source;
};

/// Adds the entries of a dict of bool, int, float, str and lists of one of them; throws invalid_argument naming the
/// key.
void add_metadata(io::MetadataWriter& out, const pybind11::dict& metadata);

/// Bytes from a file as a Python string; what is not UTF-8 becomes U+FFFD.
inline pybind11::str text_or_replacement(std::string_view bytes) {
  return pybind11::reinterpret_steal<pybind11::str>(
      PyUnicode_DecodeUTF8(bytes.data(), static_cast<Py_ssize_t>(bytes.size()), "replace"));
}

}  // namespace nb::bindings
