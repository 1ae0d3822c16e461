// Masks.
#include "arrays.hpp"
#include "taco/masking.hpp"
#include <utility>

namespace taco::python {
namespace {

taco::MaskKind mask_kind(const std::string& name) {
  if (name == "token") return taco::MaskKind::token;
  if (name == "whole_word") return taco::MaskKind::whole_word;
  if (name == "span") return taco::MaskKind::span;
  throw std::invalid_argument("masking: expected token, whole_word or span, found " + name);
}

taco::Masker make_masker(uint64_t seed, double rate, const std::string& kind, double mean_span_length, int64_t mask_id,
                         const Array<bool>& is_special, const Array<bool>& continues_word,
                         const Array<int64_t>& ordinary_ids) {
  return taco::Masker(
      {seed, rate, mask_kind(kind), mean_span_length, mask_id, to_vector<bool, uint8_t>(is_special, "is_special"),
       to_vector<bool, uint8_t>(continues_word, "continues_word"), to_vector<int64_t>(ordinary_ids, "ordinary_ids")});
}

py::tuple mask_rows(const taco::Masker& masker, Array<int64_t>& ids, const Array<int64_t>& samples,
                    const Array<int64_t>& epochs, int64_t num_predictions) {
  if (ids.ndim() != 2) throw std::invalid_argument("ids: expected two dimensions, found " + shape_text(ids));
  check_aligned(ids, "ids");
  const py::ssize_t num_rows = ids.shape(0), seq_length = ids.shape(1);
  // A row has no more predictions than columns; with larger numbers the outputs' size could overflow.
  if (num_predictions < 1 || num_predictions > seq_length) {
    throw std::invalid_argument("num_predictions must be at least 1 and at most the row's " +
                                std::to_string(seq_length) + " columns, found " + std::to_string(num_predictions));
  }
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

// Like mask_rows, but first marks the valid tokens, and writes everything to the caller's arrays.
void mask_batch(const taco::Masker& masker, Array<int64_t>& ids, const Array<int64_t>& segment,
                const Array<int64_t>& samples, const Array<int64_t>& epochs, bool exclude_special,
                Array<bool>& out_valid, Array<int64_t>& out_index, Array<int64_t>& out_labels) {
  if (ids.ndim() != 2) throw std::invalid_argument("ids: expected two dimensions, found " + shape_text(ids));
  check_aligned(ids, "ids");
  const py::ssize_t num_rows = ids.shape(0), seq_length = ids.shape(1);
  check_shape(segment, "segment", {num_rows, seq_length});
  check_shape(samples, "samples", {num_rows});
  check_shape(epochs, "epochs", {num_rows});
  check_shape(out_valid, "out_valid", {num_rows, seq_length});
  check_vector(out_index, "out_index");
  const py::ssize_t num_predictions = num_rows == 0 ? 1 : out_index.size() / num_rows;
  check_shape(out_index, "out_index", {num_rows * num_predictions});
  check_shape(out_labels, "out_labels", {num_rows * num_predictions});
  const int64_t *const sample_data = samples.data(), *const epoch_data = epochs.data();
  const int64_t* const segment_data = segment.data();
  int64_t *const id_data = ids.mutable_data(), *const index_data = out_index.mutable_data(),
                 *const label_data = out_labels.mutable_data();
  bool* const valid_data = out_valid.mutable_data();
  py::gil_scoped_release release;
  masker.mark_valid(num_rows * seq_length, id_data, segment_data, exclude_special, valid_data);
  masker.mask_rows(num_rows, seq_length, num_predictions, sample_data, epoch_data, id_data, index_data, label_data);
}

}  // namespace

void bind_masks(py::module_& module) {
  py::class_<taco::Masker>(module, "Masker")
      .def(py::init(&make_masker), py::kw_only(), "seed"_a, "rate"_a, "kind"_a, "mean_span_length"_a, "mask_id"_a,
           "is_special"_a.noconvert(), "continues_word"_a.noconvert(), "ordinary_ids"_a.noconvert())
      .def("mask_rows", &mask_rows, "ids"_a.noconvert(), "samples"_a.noconvert(), "epochs"_a.noconvert(),
           "num_predictions"_a)
      .def("mask_batch", &mask_batch, "ids"_a.noconvert(), "segment"_a.noconvert(), "samples"_a.noconvert(),
           "epochs"_a.noconvert(), py::kw_only(), "exclude_special"_a, "out_valid"_a.noconvert(),
           "out_index"_a.noconvert(), "out_labels"_a.noconvert());
}

}  // namespace taco::python
