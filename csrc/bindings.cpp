// The only file that knows Python: checks dtypes and shapes, lets go of the GIL, hands plain pointers to the library.
//
// Nothing is converted on the way: an array of another dtype or layout is a TypeError. std::invalid_argument becomes
// ValueError, std::out_of_range IndexError. pretrain/data/sample_index.py is the one module that imports this.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "taco/masking.hpp"
#include "taco/permutation.hpp"
#include "taco/philox.hpp"
#include "taco/rows.hpp"
#include "taco/sample_index.hpp"

namespace py = pybind11;
using namespace pybind11::literals;

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

std::string shape_text(const py::array& array) { return py::str(array.attr("shape")).cast<std::string>(); }

void check_shape(const py::array& array, const char* name, const std::vector<py::ssize_t>& expected) {
  const bool is_equal = array.ndim() == static_cast<py::ssize_t>(expected.size()) &&
                        std::equal(expected.begin(), expected.end(), array.shape());
  if (is_equal) return;
  std::string text;
  for (const py::ssize_t size : expected) text += (text.empty() ? "" : ", ") + std::to_string(size);
  throw std::invalid_argument(std::string(name) + ": expected shape [" + text + "], found " + shape_text(array));
}

void check_vector(const py::array& array, const char* name) {
  if (array.ndim() == 1) return;
  throw std::invalid_argument(std::string(name) + ": expected one dimension, found shape " + shape_text(array));
}

template <typename T, typename U = T>
std::vector<U> to_vector(const Array<T>& array, const char* name) {
  check_vector(array, name);
  return std::vector<U>(array.data(), array.data() + array.size());
}

// -- philox, order ----------------------------------------------------------------------------------------------------

Array<uint32_t> philox(const Array<uint32_t>& counter, const Array<uint32_t>& key) {
  check_shape(counter, "counter", {4});
  check_shape(key, "key", {2});
  const uint32_t *const c = counter.data(), *const k = key.data();
  const auto words = taco::philox4x32({c[0], c[1], c[2], c[3]}, {k[0], k[1]});
  return Array<uint32_t>(4, words.data());
}

Array<int64_t> permute(uint64_t seed, int64_t epoch, const Array<int64_t>& positions, int64_t size) {
  check_vector(positions, "positions");
  Array<int64_t> samples(positions.size());
  const int64_t* const from = positions.data();
  int64_t* const to = samples.mutable_data();
  const py::ssize_t count = positions.size();
  py::gil_scoped_release release;
  taco::Permutation(seed, epoch, size).look_up(from, count, to);
  return samples;
}

// -- rows -------------------------------------------------------------------------------------------------------------

taco::RowMode row_mode(const std::string& name) {
  if (name == "stream") return taco::RowMode::stream;
  if (name == "document") return taco::RowMode::document;
  throw std::invalid_argument("row mode: expected stream or document, found " + name);
}

taco::RowIndex make_index(const std::string& mode, const Array<int64_t>& offsets, int64_t seq_length) {
  check_vector(offsets, "offsets");
  const taco::RowMode parsed = row_mode(mode);
  const int64_t* const data = offsets.data();
  const int64_t num_documents = offsets.size() - 1;
  py::gil_scoped_release release;
  return taco::RowIndex(parsed, data, num_documents, seq_length);
}

Array<int64_t> first_tokens(const taco::RowIndex& index, const Array<int64_t>& rows) {
  check_vector(rows, "rows");
  Array<int64_t> result(rows.size());
  const int64_t* const from = rows.data();
  int64_t* const to = result.mutable_data();
  const py::ssize_t count = rows.size();
  py::gil_scoped_release release;
  for (py::ssize_t i = 0; i < count; ++i) {
    const taco::RowStart start = index.locate(from[i]);
    to[i] = index.first_token(start.document) + start.offset;
  }
  return result;
}

template <typename Token>
void fill(const taco::RowIndex& index, const Array<Token>& tokens, const Array<int64_t>& rows, int64_t vocab_size,
          int64_t cls, int64_t sep, int64_t pad, Array<int64_t>& out_ids, Array<int64_t>& out_segment) {
  check_vector(tokens, "tokens");
  check_vector(rows, "rows");
  check_shape(out_ids, "out_ids", {rows.size(), static_cast<py::ssize_t>(index.seq_length())});
  check_shape(out_segment, "out_segment", {rows.size(), static_cast<py::ssize_t>(index.seq_length())});
  const Token* const token_data = tokens.data();
  const int64_t* const row_data = rows.data();
  int64_t* const id_data = out_ids.mutable_data();
  int64_t* const segment_data = out_segment.mutable_data();
  const int64_t num_tokens = tokens.size(), num_rows = rows.size();
  py::gil_scoped_release release;
  const taco::RowIds ids{vocab_size, cls, sep, pad};
  taco::fill_rows(index, token_data, num_tokens, row_data, num_rows, ids, id_data, segment_data);
}

template <typename... Tokens>
void bind_fill(py::class_<taco::RowIndex>& index) {
  // One overload per token dtype; noconvert keeps pybind11 from casting to the first that would do.
  (index.def("fill", &fill<Tokens>, "tokens"_a.noconvert(), "rows"_a.noconvert(), py::kw_only(), "vocab_size"_a,
             "cls"_a, "sep"_a, "pad"_a, "out_ids"_a.noconvert(), "out_segment"_a.noconvert()),
   ...);
}

// -- masks ------------------------------------------------------------------------------------------------------------

taco::MaskKind mask_kind(const std::string& name) {
  if (name == "token") return taco::MaskKind::token;
  if (name == "whole_word") return taco::MaskKind::whole_word;
  if (name == "span") return taco::MaskKind::span;
  throw std::invalid_argument("masking: expected token, whole_word or span, found " + name);
}

taco::Masker make_masker(uint64_t seed, double rate, const std::string& kind, double mean_span_length, int64_t mask_id,
                         const Array<bool>& is_special, const Array<bool>& continues_word,
                         const Array<int64_t>& ordinary_ids) {
  return taco::Masker({seed, rate, mask_kind(kind), mean_span_length, mask_id,
                       to_vector<bool, uint8_t>(is_special, "is_special"),
                       to_vector<bool, uint8_t>(continues_word, "continues_word"),
                       to_vector<int64_t>(ordinary_ids, "ordinary_ids")});
}

py::tuple mask_rows(const taco::Masker& masker, Array<int64_t>& ids, const Array<int64_t>& samples,
                    const Array<int64_t>& epochs, int64_t num_predictions) {
  if (ids.ndim() != 2) throw std::invalid_argument("ids: expected two dimensions, found " + shape_text(ids));
  if (num_predictions < 1) throw std::invalid_argument("num_predictions must be at least 1");
  const py::ssize_t num_rows = ids.shape(0), seq_length = ids.shape(1);
  check_shape(samples, "samples", {num_rows});
  check_shape(epochs, "epochs", {num_rows});
  Array<int64_t> index(num_rows * num_predictions), labels(num_rows * num_predictions);
  const int64_t *const sample_data = samples.data(), *const epoch_data = epochs.data();
  int64_t *const id_data = ids.mutable_data(), *const index_data = index.mutable_data(),
                 *const label_data = labels.mutable_data();
  {
    py::gil_scoped_release release;
    masker.mask_rows(num_rows, seq_length, num_predictions, sample_data, epoch_data, id_data, index_data, label_data);
  }
  return py::make_tuple(std::move(index), std::move(labels));
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "Sample index, sample order and masking of pretrain.data; see csrc/include/taco for the contracts.";

  module.def("philox4x32", &philox, "counter"_a.noconvert(), "key"_a.noconvert());
  module.def("permute", &permute, "seed"_a, "epoch"_a, "positions"_a.noconvert(), "size"_a);

  py::class_<taco::RowIndex> index(module, "RowIndex");
  index.def(py::init(&make_index), "mode"_a, "offsets"_a.noconvert(), "seq_length"_a)
      .def_property_readonly("num_rows", &taco::RowIndex::num_rows)
      .def_property_readonly("num_left_out", &taco::RowIndex::num_left_out)
      .def_property_readonly("memory_bytes", &taco::RowIndex::memory_bytes)
      .def("first_tokens", &first_tokens, "rows"_a.noconvert());
  bind_fill<uint16_t, int32_t, uint8_t, int8_t, int16_t, int64_t>(index);

  py::class_<taco::Masker>(module, "Masker")
      .def(py::init(&make_masker), py::kw_only(), "seed"_a, "rate"_a, "kind"_a, "mean_span_length"_a, "mask_id"_a,
           "is_special"_a.noconvert(), "continues_word"_a.noconvert(), "ordinary_ids"_a.noconvert())
      .def("mask_rows", &mask_rows, "ids"_a.noconvert(), "samples"_a.noconvert(), "epochs"_a.noconvert(),
           "num_predictions"_a);
}
