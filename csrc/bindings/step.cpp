// The element-wise work of an encoder layer.
#include "arrays.hpp"
#include "taco/step.hpp"
#include <pybind11/stl.h>

#include <optional>

namespace taco::python {
namespace {

using LineNumbers = std::optional<Array<int64_t>>;

// words: key low, key high, place << 16, micro-batch low, micro-batch high, and others that are not used here.
taco::DropoutPlace place_of(const Array<int64_t>& words, int64_t threshold) {
  check_vector(words, "words");
  if (words.size() < 5) throw std::invalid_argument("words: expected at least 5, found " + shape_text(words));
  if (threshold < 0 || threshold > 65535) {
    throw std::invalid_argument("threshold must be in 0 .. 65535, found " + std::to_string(threshold));
  }
  const auto word = [&](py::ssize_t i) { return static_cast<uint32_t>(words.data()[i]); };
  return {{word(0), word(1)}, word(2), {word(3), word(4)}, static_cast<uint32_t>(threshold)};
}

taco::Lines lines_of(const LineNumbers& numbers, int64_t first, py::ssize_t num_lines) {
  if (!numbers) return {nullptr, first};
  check_shape(*numbers, "lines", {num_lines});
  return {numbers->data(), 0};
}

template <typename T>
void check_matrix(const Array<T>& array, const char* name) {
  if (array.ndim() == 2) return check_aligned(array, name);
  throw std::invalid_argument(std::string(name) + ": expected two dimensions, found " + shape_text(array));
}

void fill_keep(const Array<int64_t>& words, int64_t threshold, const LineNumbers& lines, int64_t first_line,
               Array<bool>& keep, int num_threads) {
  check_matrix(keep, "keep");
  const auto place = place_of(words, threshold);
  const py::ssize_t num_lines = keep.shape(0), width = keep.shape(1);
  const auto numbers = lines_of(lines, first_line, num_lines);
  bool* const keep_data = keep.mutable_data();
  py::gil_scoped_release release;
  taco::fill_keep(place, numbers, num_lines, width, keep_data, num_threads);
}

void drop(const Array<int64_t>& words, int64_t threshold, float scale, const LineNumbers& lines, int64_t first_line,
          const Array<float>& in, Array<float>& out, int num_threads) {
  check_matrix(in, "in");
  const auto place = place_of(words, threshold);
  const py::ssize_t num_lines = in.shape(0), width = in.shape(1);
  check_shape(out, "out", {num_lines, width});
  const auto numbers = lines_of(lines, first_line, num_lines);
  const float* const in_data = in.data();
  float* const out_data = out.mutable_data();
  py::gil_scoped_release release;
  taco::drop(place, scale, numbers, num_lines, width, in_data, out_data, num_threads);
}

void add_norm(const Array<int64_t>& words, int64_t threshold, float scale, const LineNumbers& lines, int64_t first_line,
              const Array<float>& hidden, const Array<float>& residual, const Array<float>& weight,
              const Array<float>& bias, float eps, Array<float>& out, Array<float>& rstd, int num_threads) {
  check_matrix(hidden, "hidden");
  const auto place = place_of(words, threshold);
  const py::ssize_t num_lines = hidden.shape(0), width = hidden.shape(1);
  if (width == 0) throw std::invalid_argument("hidden: expected at least one feature");
  check_shape(residual, "residual", {num_lines, width});
  check_shape(weight, "weight", {width});
  check_shape(bias, "bias", {width});
  check_shape(out, "out", {num_lines, width});
  check_shape(rstd, "rstd", {num_lines});
  const auto numbers = lines_of(lines, first_line, num_lines);
  const float *const hidden_data = hidden.data(), *const residual_data = residual.data(),
                     *const weight_data = weight.data(), *const bias_data = bias.data();
  float *const out_data = out.mutable_data(), *const rstd_data = rstd.mutable_data();
  py::gil_scoped_release release;
  taco::add_norm(place, scale, numbers, num_lines, width, hidden_data, residual_data, weight_data, bias_data, eps,
                 out_data, rstd_data, num_threads);
}

void add_norm_backward(const Array<int64_t>& words, int64_t threshold, float scale, const LineNumbers& lines,
                       int64_t first_line, const Array<float>& grad, const Array<float>& out, const Array<float>& rstd,
                       const Array<float>& weight, const Array<float>& bias, Array<float>& grad_hidden,
                       Array<float>& grad_residual, Array<float>& grad_weight, Array<float>& grad_bias,
                       int num_threads) {
  check_matrix(grad, "grad");
  const auto place = place_of(words, threshold);
  const py::ssize_t num_lines = grad.shape(0), width = grad.shape(1);
  if (width == 0) throw std::invalid_argument("grad: expected at least one feature");
  check_shape(out, "out", {num_lines, width});
  check_shape(grad_hidden, "grad_hidden", {num_lines, width});
  check_shape(grad_residual, "grad_residual", {num_lines, width});
  check_shape(rstd, "rstd", {num_lines});
  check_shape(weight, "weight", {width});
  check_shape(bias, "bias", {width});
  check_shape(grad_weight, "grad_weight", {width});
  check_shape(grad_bias, "grad_bias", {width});
  const auto numbers = lines_of(lines, first_line, num_lines);
  const float *const grad_data = grad.data(), *const out_value = out.data(), *const rstd_data = rstd.data(),
                     *const weight_data = weight.data(), *const bias_data = bias.data();
  float *const hidden_data = grad_hidden.mutable_data(), *const residual_data = grad_residual.mutable_data(),
               *const weight_sum = grad_weight.mutable_data(), *const bias_sum = grad_bias.mutable_data();
  py::gil_scoped_release release;
  taco::add_norm_backward(place, scale, numbers, num_lines, width, grad_data, out_value, rstd_data, weight_data,
                          bias_data, hidden_data, residual_data, weight_sum, bias_sum, num_threads);
}

}  // namespace

void bind_step(py::module_& module) {
  module.def("fill_keep", &fill_keep, "words"_a.noconvert(), "threshold"_a, "lines"_a.noconvert(), "first_line"_a,
             "keep"_a.noconvert(), "num_threads"_a);
  module.def("drop", &drop, "words"_a.noconvert(), "threshold"_a, "scale"_a, "lines"_a.noconvert(), "first_line"_a,
             "values"_a.noconvert(), "out"_a.noconvert(), "num_threads"_a);
  module.def("add_norm", &add_norm, "words"_a.noconvert(), "threshold"_a, "scale"_a, "lines"_a.noconvert(),
             "first_line"_a, "hidden"_a.noconvert(), "residual"_a.noconvert(), "weight"_a.noconvert(),
             "bias"_a.noconvert(), "eps"_a, "out"_a.noconvert(), "rstd"_a.noconvert(), "num_threads"_a);
  module.def("add_norm_backward", &add_norm_backward, "words"_a.noconvert(), "threshold"_a, "scale"_a,
             "lines"_a.noconvert(), "first_line"_a, "grad"_a.noconvert(), "out"_a.noconvert(), "rstd"_a.noconvert(),
             "weight"_a.noconvert(), "bias"_a.noconvert(), "grad_hidden"_a.noconvert(), "grad_residual"_a.noconvert(),
             "grad_weight"_a.noconvert(), "grad_bias"_a.noconvert(), "num_threads"_a);
}

}  // namespace taco::python
