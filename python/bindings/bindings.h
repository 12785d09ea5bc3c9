// Shared by the binding files: what each registers, and how errors cross into Python.
//
// No logic lives here: convert, release the GIL, call, convert. Called under the GIL.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>

#include "io/gguf_file.h"

namespace nb::bindings {

void bind_system(pybind11::module_& module);
void bind_text(pybind11::module_& module);
void bind_engine(pybind11::module_& module);

/// Opens a model file by its content; throws unsupported for kinds that are not offered.
std::shared_ptr<const io::GgufFile> open_model_file(const std::string& path);

}  // namespace nb::bindings
