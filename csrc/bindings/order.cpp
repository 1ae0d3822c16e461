// Philox words and the order of samples.
#include "arrays.hpp"
#include "taco/blend.hpp"
#include "taco/permutation.hpp"
#include "taco/philox.hpp"

namespace taco::python {
namespace {

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

py::tuple look_up(const taco::Blend& blend, const Array<int64_t>& positions) {
  check_vector(positions, "positions");
  const py::ssize_t count = positions.size();
  Array<int64_t> datasets(count), epochs(count), rows(count);
  const int64_t* const from = positions.data();
  int64_t *const dataset_data = datasets.mutable_data(), *const epoch_data = epochs.mutable_data(),
                 *const row_data = rows.mutable_data();
  {
    py::gil_scoped_release release;
    blend.look_up(from, count, dataset_data, epoch_data, row_data);
  }
  return py::make_tuple(std::move(datasets), std::move(epochs), std::move(rows));
}

}  // namespace

void bind_order(py::module_& module) {
  module.def("philox4x32", &philox, "counter"_a.noconvert(), "key"_a.noconvert());
  module.def("permute", &permute, "seed"_a, "epoch"_a, "positions"_a.noconvert(), "size"_a);
  module.def(
      "whole_weights",
      [](const Array<double>& shares) {
        const std::vector<int64_t> weights = taco::whole_weights(to_vector<double>(shares, "shares"));
        return Array<int64_t>(static_cast<py::ssize_t>(weights.size()), weights.data());
      },
      "shares"_a.noconvert());
  py::class_<taco::Blend>(module, "Blend")
      .def(py::init([](uint64_t seed, const Array<int64_t>& weights, const Array<int64_t>& num_rows, bool shuffle) {
             return taco::Blend(seed, to_vector<int64_t>(weights, "weights"), to_vector<int64_t>(num_rows, "num_rows"),
                                shuffle);
           }),
           "seed"_a, "weights"_a.noconvert(), "num_rows"_a.noconvert(), "shuffle"_a)
      .def("look_up", &look_up, "positions"_a.noconvert());
}

}  // namespace taco::python
