// The module pretrain.data._native. Only this folder knows Python: it checks dtypes and shapes, releases the GIL and
// passes plain pointers to the library.
//
// Nothing is converted: an array of another dtype or layout is a TypeError. std::invalid_argument becomes ValueError,
// std::out_of_range IndexError. Only pretrain/data/native.py imports this module.
#include "arrays.hpp"

PYBIND11_MODULE(_native, module) {
  module.doc() = "The C++ code of pretrain.data; see csrc/include/taco for the contracts.";
  module.attr("sources") = TACO_SOURCES;  // see pretrain/data/native_build.py
  taco::python::bind_order(module);
  taco::python::bind_rows(module);
  taco::python::bind_masks(module);
  taco::python::bind_sentences(module);
  taco::python::bind_duplicates(module);
  taco::python::bind_text(module);
  taco::python::bind_splits(module);
  taco::python::bind_optimizer(module);
  taco::python::bind_step(module);
}
