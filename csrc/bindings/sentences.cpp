// Sentences.
#include <string_view>

#include "arrays.hpp"
#include "taco/sentences.hpp"

namespace taco::python {
namespace {

// The UTF-8 bytes of a str, owned by the str.
std::string_view utf8_view(const py::handle& text, size_t number) {
  if (PyUnicode_Check(text.ptr()) == 0) {
    throw py::type_error("text " + std::to_string(number) + ": expected str, found " +
                         py::str(py::type::of(text).attr("__name__")).cast<std::string>());
  }
  Py_ssize_t size = 0;
  const char* const data = PyUnicode_AsUTF8AndSize(text.ptr(), &size);
  if (data == nullptr) throw py::error_already_set();  // UnicodeEncodeError: a lone surrogate
  return {data, static_cast<size_t>(size)};
}

py::object to_str(std::string_view bytes) {
  PyObject* const text = PyUnicode_DecodeUTF8(bytes.data(), static_cast<Py_ssize_t>(bytes.size()), "strict");
  if (text == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(text);
}

py::tuple split_sentences(const py::sequence& texts) {
  const py::tuple kept(texts);  // our own copy: the views below live as long as it does
  std::vector<std::string_view> views;
  views.reserve(kept.size());
  for (const py::handle text : kept) views.push_back(utf8_view(text, views.size()));
  std::vector<std::vector<taco::Sentence>> found(views.size());
  {
    py::gil_scoped_release release;
    for (size_t i = 0; i < views.size(); ++i) found[i] = taco::split_sentences(views[i]);
  }
  py::list sentences;
  Array<int64_t> counts(static_cast<py::ssize_t>(views.size()));
  int64_t* const count_data = counts.mutable_data();
  for (size_t i = 0; i < views.size(); ++i) {
    count_data[i] = static_cast<int64_t>(found[i].size());
    for (const taco::Sentence& sentence : found[i]) {
      sentences.append(to_str(views[i].substr(sentence.begin, sentence.end - sentence.begin)));
    }
  }
  return py::make_tuple(std::move(sentences), std::move(counts));
}

}  // namespace

void bind_sentences(py::module_& module) { module.def("split_sentences", &split_sentences, "texts"_a); }

}  // namespace taco::python
