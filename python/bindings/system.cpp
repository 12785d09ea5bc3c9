// Facts about the build, the machine and files.
#include <pybind11/functional.h>
#include <pybind11/stl.h>

#include "base/log.h"
#include "base/memory_info.h"
#include "base/threads.h"
#include "bindings.h"
#include "ops/backends.h"

namespace py = pybind11;

namespace nb::bindings {
namespace {

py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["build_type"] = NANOBRAID_BUILD_TYPE;
  info["sanitizers"] = NANOBRAID_SANITIZERS;
  info["pybind11"] = PYBIND11_TOSTRING(PYBIND11_VERSION_MAJOR) "." PYBIND11_TOSTRING(PYBIND11_VERSION_MINOR);
  info["cuda"] = NANOBRAID_HAS_CUDA != 0;
  return info;
}

std::string cuda_status() {
  const ops::Backend& backend = ops::compiled_backends().back();
  if (backend.usable()) return "usable: " + backend.hardware;
  return "not usable: " + backend.why_not;
}

py::dict memory_status() {
  const MemoryInfo memory = memory_info();
  py::dict status;
  status["rss_bytes"] = memory.rss_bytes;
  status["peak_rss_bytes"] = memory.peak_rss_bytes;
  status["available_bytes"] = memory.available_bytes;
  return status;
}

void set_sink(std::optional<std::function<void(std::string, std::string)>> sink) {
  if (!sink) {
    set_log_sink({});
    return;
  }
  // Lines may come from a thread without the GIL; an exception in the sink must not cross the core.
  set_log_sink([sink = std::move(*sink)](LogLevel level, const std::string& line) {
    const py::gil_scoped_acquire gil;
    try {
      sink(to_string(level), line);
    } catch (py::error_already_set& error) {
      error.discard_as_unraisable("nanobraid log sink");
    }
  });
}

std::string type_of(const io::MetadataValue& value) {
  if (value.type != io::ValueType::array) return io::to_string(value.type);
  return std::string("array of ") + io::to_string(value.element_type);
}

py::dict inspect_file(const std::string& path) {
  const auto file = io::open_model(path);
  py::list metadata, tensors, sections;
  for (const auto& [key, value] : file->metadata().entries()) {
    metadata.append(py::make_tuple(text_or_replacement(key), type_of(value),
                                   text_or_replacement(file->metadata().describe(value, 8))));
  }
  for (const io::TensorInfo& tensor : file->tensors()) {
    tensors.append(py::make_tuple(text_or_replacement(tensor.name), tensor.format_name, tensor.shape, tensor.bytes));
  }
  for (const io::SectionInfo& section : file->sections()) {
    sections.append(py::make_tuple(section.name, section.offset, section.bytes));
  }
  py::dict out;
  out["format"] = io::to_string(file->kind());
  out["version"] = file->version();
  out["file_bytes"] = file->file_bytes();
  out["fingerprint"] = file->fingerprint();
  out["parts"] = file->parts();
  out["sections"] = sections;
  out["metadata"] = metadata;
  out["tensors"] = tensors;
  return out;
}

}  // namespace

void bind_system(py::module_& module) {
  module.def("build_info", &build_info);
  module.def("cpu_features", &ops::cpu_features);
  module.def("available_backends", &ops::available_backends);
  module.def("cuda_status", &cuda_status);
  module.def("default_num_threads", &ThreadPool::default_num_threads);
  module.def("memory_status", &memory_status);
  module.def(
      "set_log_level", [](const std::string& level) { set_log_level(parse_log_level(level)); }, py::arg("level"));
  module.def("set_log_sink", &set_sink, py::arg("sink").none(true));
  module.def("inspect_file", &inspect_file, py::arg("path"));
}

}  // namespace nb::bindings
