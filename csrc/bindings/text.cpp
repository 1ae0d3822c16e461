// Text to token ids.
#include "arrays.hpp"
#include "taco/token_buffer.hpp"
#include "taco/wordpiece.hpp"

#include <pybind11/stl.h>

#include <cstdlib>
#include <memory>
#include <string_view>
#include <utility>

namespace taco::python {
namespace {

taco::WordPieceVocabulary make_vocabulary(const std::vector<std::string>& pieces,
                                          const std::vector<std::pair<std::string, int64_t>>& special,
                                          int64_t unknown_id, bool is_cased, int64_t max_word_characters) {
  taco::WordPieceVocabulary vocabulary{pieces, {}, unknown_id, is_cased, max_word_characters};
  for (const auto& [text, id] : special) vocabulary.special.push_back({text, id});
  return vocabulary;
}

// The UTF-8 of each str, which lives as long as the str: no copy if the text is ASCII, else one copy cached by Python.
std::vector<std::string_view> view_texts(const py::tuple& texts) {
  std::vector<std::string_view> views;
  views.reserve(texts.size());
  for (const py::handle text : texts) {
    if (!PyUnicode_Check(text.ptr())) {
      const auto name = py::str(py::type::of(text).attr("__name__")).cast<std::string>();
      throw py::type_error("texts: expected str, found " + name);
    }
    Py_ssize_t size = 0;
    const char* const data = PyUnicode_AsUTF8AndSize(text.ptr(), &size);
    if (data == nullptr) throw py::error_already_set();
    views.emplace_back(data, static_cast<size_t>(size));
  }
  return views;
}

template <typename Id>
py::tuple encode(const taco::WordPiece<Id>& tokenizer, const py::sequence& texts) {
  const py::tuple kept(texts);  // keeps every text alive, even if the caller's list changes meanwhile
  const std::vector<std::string_view> views = view_texts(kept);
  const auto count = static_cast<int64_t>(views.size());
  Array<int64_t> lengths(count);
  int64_t* const length_data = lengths.mutable_data();
  taco::TokenBuffer<Id> ids;
  size_t size = 0;
  Id* data = nullptr;
  {
    py::gil_scoped_release release;
    tokenizer.encode(views.data(), count, ids, length_data);
    size = ids.size();
    data = ids.release();
  }
  const py::capsule owner(data, [](void* memory) { std::free(memory); });
  return py::make_tuple(py::array_t<Id>(static_cast<py::ssize_t>(size), data, owner), std::move(lengths));
}

template <typename Id>
void bind_word_piece(py::module_& module, const char* name) {
  py::class_<taco::WordPiece<Id>>(module, name)
      .def(py::init([](const std::vector<std::string>& pieces,
                       const std::vector<std::pair<std::string, int64_t>>& special, int64_t unknown_id, bool is_cased,
                       int64_t max_word_characters) {
             const auto vocabulary = make_vocabulary(pieces, special, unknown_id, is_cased, max_word_characters);
             return std::make_unique<taco::WordPiece<Id>>(vocabulary);
           }),
           py::kw_only(), "pieces"_a, "special"_a, "unknown_id"_a, "is_cased"_a, "max_word_characters"_a)
      .def("encode", &encode<Id>, "texts"_a);
}

}  // namespace

void bind_text(py::module_& module) {
  bind_word_piece<uint16_t>(module, "WordPiece16");
  bind_word_piece<int32_t>(module, "WordPiece32");
}

}  // namespace taco::python
