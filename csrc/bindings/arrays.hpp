// Shared by all bindings: array types without silent conversion, and shape checks.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

namespace taco::python {

namespace py = pybind11;
using namespace pybind11::literals;

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

inline std::string shape_text(const py::array& array) { return py::str(array.attr("shape")).cast<std::string>(); }

// A view into a byte buffer can have the right dtype but a misaligned address.
inline void check_aligned(const py::array& array, const char* name) {
  if ((array.flags() & py::detail::npy_api::NPY_ARRAY_ALIGNED_) != 0) return;
  throw std::invalid_argument(std::string(name) + ": the array is not aligned in memory; pass a copy of it");
}

inline void check_shape(const py::array& array, const char* name, const std::vector<py::ssize_t>& expected) {
  const bool is_equal = array.ndim() == static_cast<py::ssize_t>(expected.size()) &&
                        std::equal(expected.begin(), expected.end(), array.shape());
  if (is_equal) return check_aligned(array, name);
  std::string text;
  for (const py::ssize_t size : expected) text += (text.empty() ? "" : ", ") + std::to_string(size);
  throw std::invalid_argument(std::string(name) + ": expected shape [" + text + "], found " + shape_text(array));
}

inline void check_vector(const py::array& array, const char* name) {
  if (array.ndim() == 1) return check_aligned(array, name);
  throw std::invalid_argument(std::string(name) + ": expected one dimension, found shape " + shape_text(array));
}

template <typename T, typename U = T>
std::vector<U> to_vector(const Array<T>& array, const char* name) {
  check_vector(array, name);
  return std::vector<U>(array.data(), array.data() + array.size());
}

// One per file in this folder: adds its functions and classes to the module.
void bind_order(py::module_& module);
void bind_rows(py::module_& module);
void bind_masks(py::module_& module);
void bind_sentences(py::module_& module);
void bind_duplicates(py::module_& module);
void bind_text(py::module_& module);
void bind_splits(py::module_& module);
void bind_optimizer(py::module_& module);
void bind_step(py::module_& module);

}  // namespace taco::python
