// Philox words and the order of samples.
#include "arrays.hpp"
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

}  // namespace

void bind_order(py::module_& module) {
  module.def("philox4x32", &philox, "counter"_a.noconvert(), "key"_a.noconvert());
  module.def("permute", &permute, "seed"_a, "epoch"_a, "positions"_a.noconvert(), "size"_a);
}

}  // namespace taco::python
