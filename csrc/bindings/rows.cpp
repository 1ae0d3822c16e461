// The sample index and the rows that it fills.
#include "arrays.hpp"
#include "taco/rows.hpp"
#include "taco/sample_index.hpp"

namespace taco::python {
namespace {

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

}  // namespace

void bind_rows(py::module_& module) {
  py::class_<taco::RowIndex> index(module, "RowIndex");
  index.def(py::init(&make_index), "mode"_a, "offsets"_a.noconvert(), "seq_length"_a)
      .def_property_readonly("num_rows", &taco::RowIndex::num_rows)
      .def_property_readonly("num_left_out", &taco::RowIndex::num_left_out)
      .def_property_readonly("memory_bytes", &taco::RowIndex::memory_bytes)
      .def("first_tokens", &first_tokens, "rows"_a.noconvert());
  bind_fill<uint16_t, int32_t, uint8_t, int8_t, int16_t, int64_t>(index);
}

}  // namespace taco::python
