// A constraint of the engine's that asks a Python object, which has a grammar.
//
// The engine calls it from threads that do not hold the GIL and may not be Python's.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <utility>

#include "base/error.h"
#include "bindings.h"

namespace py = pybind11;

namespace nb::bindings {
namespace {

// A reference that any thread may drop. At the end of the interpreter it is left alone.
std::shared_ptr<py::object> shared_reference(py::object object) {
  return {new py::object(std::move(object)), [](py::object* pointer) {
            if (Py_IsInitialized() == 0) return;
            const py::gil_scoped_acquire acquire;
            delete pointer;
          }};
}

// Runs Python code under the GIL; what it raises becomes an Error with the message alone.
template <class Run>
auto in_python(const Run& run) {
  const py::gil_scoped_acquire acquire;
  try {
    return run();
  } catch (const py::error_already_set& error) {
    throw Error(ErrorCode::invalid_argument, py::cast<std::string>(py::str(error.value())));
  } catch (const py::cast_error& error) {
    throw Error(ErrorCode::internal, error.what());
  }
}

// See GuidedMatcher in python/nanobraid/guided.py.
class PythonConstraint : public engine::TokenConstraint {
 public:
  explicit PythonConstraint(const py::object& plan) {
    in_python([&] {
      matcher_ = shared_reference(plan.attr("matcher")());
      const auto mask = matcher_->attr("mask").cast<py::array_t<std::uint32_t>>();
      words_ = {mask.data(), static_cast<std::size_t>(mask.size())};  // the matcher keeps it
    });
  }

  bool allow(std::span<std::uint32_t> bits) override {
    NB_CHECK(failure_.empty(), invalid_argument, failure_);
    const bool may_end = in_python([&] { return matcher_->attr("fill")().cast<bool>(); });
    std::copy_n(words_.begin(), std::min(words_.size(), bits.size()), bits.begin());
    return may_end;
  }

  bool accept(TokenId token) noexcept override {
    try {
      return in_python([&] { return matcher_->attr("accept")(token).cast<bool>(); });
    } catch (const std::exception& error) {
      failure_ = error.what();
      return false;
    }
  }

 private:
  std::shared_ptr<py::object> matcher_;
  std::span<const std::uint32_t> words_;
  std::string failure_;
};

}  // namespace

std::function<std::unique_ptr<engine::TokenConstraint>()> constraint_maker(const py::object& plan) {
  if (plan.is_none()) return {};
  return [shared = shared_reference(plan)] { return std::make_unique<PythonConstraint>(*shared); };
}

}  // namespace nb::bindings
