// The module pretrain.data._native. Only this folder knows Python: it checks dtypes and shapes, lets go of the GIL and
// hands plain pointers to the library.
//
// Nothing is converted on the way: an array of another dtype or layout is a TypeError. std::invalid_argument becomes
// ValueError, std::out_of_range IndexError. pretrain/data/native.py is the one module that imports this.
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
}
