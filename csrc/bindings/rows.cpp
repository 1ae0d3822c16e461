// The sample index and the rows that it fills.
#include "arrays.hpp"
#include "taco/pack_index.hpp"
#include "taco/rows.hpp"
#include "taco/sample_index.hpp"
#include "taco/sentence_index.hpp"
#include "taco/token_map.hpp"

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

// Indexes that are views of arrays, together with the arrays: Python may drop its own references.
struct SentenceRows {
  Array<int64_t> bases;
  Array<uint32_t> starts;
  taco::SentenceIndex index;
};

struct PackRows {
  Array<int64_t> windows;
  Array<uint32_t> row_pieces, piece_starts;
  Array<uint16_t> piece_lengths;
  taco::PackIndex index;
};

const taco::RowIndex& library(const taco::RowIndex& index) { return index; }
const taco::SentenceIndex& library(const SentenceRows& rows) { return rows.index; }
const taco::PackIndex& library(const PackRows& rows) { return rows.index; }

int64_t first_token(const taco::RowIndex& index, int64_t row) {
  const taco::RowStart start = index.locate(row);
  return index.first_token(start.document) + start.offset;
}
int64_t first_token(const taco::SentenceIndex& index, int64_t row) {
  index.check(row);
  return index.first_token(row);
}
int64_t first_token(const taco::PackIndex& index, int64_t row) { return index.first_token(row); }

taco::TokenMap token_map(const Array<int64_t>& places, const Array<int64_t>& run_tokens) {
  check_vector(places, "places");
  check_shape(run_tokens, "run_tokens", {places.size()});
  return taco::TokenMap(places.data(), run_tokens.data(), places.size());
}

template <typename Holder>
Array<int64_t> first_tokens(const Holder& holder, const Array<int64_t>& rows) {
  check_vector(rows, "rows");
  Array<int64_t> result(rows.size());
  const int64_t* const from = rows.data();
  int64_t* const to = result.mutable_data();
  const py::ssize_t count = rows.size();
  py::gil_scoped_release release;
  for (py::ssize_t i = 0; i < count; ++i) to[i] = first_token(library(holder), from[i]);
  return result;
}

template <typename Holder, typename Token>
void fill(const Holder& holder, const Array<Token>& tokens, const Array<int64_t>& rows, int64_t vocab_size, int64_t cls,
          int64_t sep, int64_t pad, const Array<int64_t>& places, const Array<int64_t>& run_tokens,
          Array<int64_t>& out_ids, Array<int64_t>& out_segment) {
  const auto& index = library(holder);
  check_vector(tokens, "tokens");
  check_vector(rows, "rows");
  check_shape(out_ids, "out_ids", {rows.size(), static_cast<py::ssize_t>(index.seq_length())});
  check_shape(out_segment, "out_segment", {rows.size(), static_cast<py::ssize_t>(index.seq_length())});
  const taco::TokenMap map = token_map(places, run_tokens);
  const Token* const token_data = tokens.data();
  const int64_t* const row_data = rows.data();
  int64_t* const id_data = out_ids.mutable_data();
  int64_t* const segment_data = out_segment.mutable_data();
  const int64_t num_tokens = tokens.size(), num_rows = rows.size();
  py::gil_scoped_release release;
  const taco::RowIds ids{vocab_size, cls, sep, pad};
  taco::fill_rows(index, map, token_data, num_tokens, row_data, num_rows, ids, id_data, segment_data);
}

template <typename Holder, typename... Tokens>
void bind_fill(py::class_<Holder>& bound) {
  const Array<int64_t> none(0);
  // One overload per token dtype; noconvert keeps pybind11 from casting to the first that fits.
  (bound.def("fill", &fill<Holder, Tokens>, "tokens"_a.noconvert(), "rows"_a.noconvert(), py::kw_only(), "vocab_size"_a,
             "cls"_a, "sep"_a, "pad"_a, "places"_a.noconvert() = none, "run_tokens"_a.noconvert() = none,
             "out_ids"_a.noconvert(), "out_segment"_a.noconvert()),
   ...);
}

template <typename Holder>
py::class_<Holder>& bind_index(py::class_<Holder>& bound) {
  bound.def_property_readonly("num_rows", [](const Holder& holder) { return library(holder).num_rows(); })
      .def("first_tokens", &first_tokens<Holder>, "rows"_a.noconvert());
  bind_fill<Holder, uint16_t, int32_t, uint8_t, int8_t, int16_t, int64_t>(bound);
  return bound;
}

// -- tables -----------------------------------------------------------------------------------------------------------

void add_documents(taco::SentenceTableBuilder& builder, const Array<int32_t>& lengths, const Array<int64_t>& firsts,
                   const Array<bool>& is_kept, int num_threads) {
  // Possibly misaligned, like the arrays of a mapped .idx file: the library uses unaligned loads.
  if (lengths.ndim() != 1 || firsts.ndim() != 1) throw std::invalid_argument("lengths, firsts: expected one dimension");
  if (firsts.size() < 1) throw std::invalid_argument("firsts must have at least one entry");
  if (is_kept.size() > 0) check_shape(is_kept, "is_kept", {firsts.size() - 1});
  // data() of bool is bool*, whose bytes are 0 and 1.
  const auto* const kept = is_kept.size() > 0 ? reinterpret_cast<const uint8_t*>(is_kept.data()) : nullptr;
  const void *const length_data = lengths.data(), *const first_data = firsts.data();
  const int64_t num_sequences = lengths.size(), num_documents = firsts.size() - 1;
  py::gil_scoped_release release;
  builder.add(length_data, num_sequences, first_data, num_documents, kept, num_threads);
}

py::tuple finish(taco::SentenceTableBuilder& builder) {
  Array<int64_t> bases(builder.num_blocks());
  Array<uint32_t> starts(builder.num_rows());
  int64_t* const base_data = bases.mutable_data();
  uint32_t* const start_data = starts.mutable_data();
  {
    py::gil_scoped_release release;
    builder.finish(base_data, start_data);
  }
  return py::make_tuple(std::move(bases), std::move(starts));
}

SentenceRows make_sentence_rows(Array<int64_t> bases, Array<uint32_t> starts, int64_t num_tokens, int64_t seq_length) {
  check_vector(bases, "bases");
  check_vector(starts, "starts");
  const taco::SentenceIndex index(bases.data(), bases.size(), starts.data(), starts.size(), num_tokens, seq_length);
  return {std::move(bases), std::move(starts), index};
}

template <typename T>
Array<T> to_array(const std::vector<T>& values) {
  return Array<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

py::tuple make_pack_table(const Array<int64_t>& offsets, int64_t seq_length, int num_threads) {
  check_vector(offsets, "offsets");
  const int64_t* const data = offsets.data();
  const int64_t num_documents = offsets.size() - 1;
  const auto build = [&] {
    py::gil_scoped_release release;
    return taco::PackTable(data, num_documents, seq_length, num_threads);
  };
  const taco::PackTable table = build();
  Array<int64_t> windows({static_cast<py::ssize_t>(table.windows.size()), py::ssize_t{3}});
  for (size_t i = 0; i < table.windows.size(); ++i) {
    const taco::PackWindow& window = table.windows[i];
    std::copy_n(std::initializer_list<int64_t>{window.row, window.piece, window.token}.begin(), 3,
                windows.mutable_data(static_cast<py::ssize_t>(i), 0));
  }
  return py::make_tuple(std::move(windows), to_array(table.row_pieces), to_array(table.piece_starts),
                        to_array(table.piece_lengths));
}

PackRows make_pack_rows(Array<int64_t> windows, Array<uint32_t> row_pieces, Array<uint32_t> piece_starts,
                        Array<uint16_t> piece_lengths, int64_t seq_length) {
  static_assert(sizeof(taco::PackWindow) == 3 * sizeof(int64_t));
  if (windows.ndim() != 2 || windows.shape(0) < 1 || windows.shape(1) != 3) {
    throw std::invalid_argument("windows: expected shape [n, 3], found " + shape_text(windows));
  }
  check_vector(row_pieces, "row_pieces");
  check_vector(piece_starts, "piece_starts");
  check_shape(piece_lengths, "piece_lengths", {piece_starts.size()});
  const taco::PackIndex index(reinterpret_cast<const taco::PackWindow*>(windows.data()), windows.shape(0) - 1,
                              row_pieces.data(), row_pieces.size(), piece_starts.data(), piece_lengths.data(),
                              piece_starts.size(), seq_length);
  return {std::move(windows), std::move(row_pieces), std::move(piece_starts), std::move(piece_lengths), index};
}

}  // namespace

void bind_rows(py::module_& module) {
  py::class_<taco::RowIndex> row_index(module, "RowIndex");
  row_index.def(py::init(&make_index), "mode"_a, "offsets"_a.noconvert(), "seq_length"_a)
      .def_property_readonly("num_left_out", &taco::RowIndex::num_left_out)
      .def_property_readonly("memory_bytes", &taco::RowIndex::memory_bytes);
  bind_index(row_index);

  py::class_<taco::SentenceTableBuilder>(module, "SentenceTableBuilder")
      .def(py::init<int64_t>(), "seq_length"_a)
      .def_property_readonly("num_rows", &taco::SentenceTableBuilder::num_rows)
      .def_property_readonly("num_tokens", &taco::SentenceTableBuilder::num_tokens)
      .def("add", &add_documents, "lengths"_a.noconvert(), "firsts"_a.noconvert(), "is_kept"_a.noconvert(),
           "num_threads"_a)
      .def("finish", &finish);
  py::class_<SentenceRows> sentence_rows(module, "SentenceIndex");
  sentence_rows.def(py::init(&make_sentence_rows), "bases"_a.noconvert(), "starts"_a.noconvert(), "num_tokens"_a,
                    "seq_length"_a);
  bind_index(sentence_rows);

  module.def("pack_table", &make_pack_table, "offsets"_a.noconvert(), "seq_length"_a, "num_threads"_a);
  py::class_<PackRows> pack_rows(module, "PackIndex");
  pack_rows.def(py::init(&make_pack_rows), "windows"_a.noconvert(), "row_pieces"_a.noconvert(),
                "piece_starts"_a.noconvert(), "piece_lengths"_a.noconvert(), "seq_length"_a);
  bind_index(pack_rows);
}

}  // namespace taco::python
