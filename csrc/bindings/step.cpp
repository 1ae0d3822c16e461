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

// What both passes over attention's scores take: the scores with their lines, and the dropout of these.
py::ssize_t check_scores(const Array<float>& score, const Array<float>& log_sum, const Array<int64_t>& lines,
                         int64_t line_width) {
  check_matrix(score, "score");
  if (score.shape(1) > line_width) {
    throw std::invalid_argument("score: a line of the mask has " + std::to_string(line_width) + " elements, found " +
                                shape_text(score));
  }
  check_shape(log_sum, "log_sum", {score.shape(0)});
  check_shape(lines, "lines", {score.shape(0)});
  return score.shape(0);
}

void attention_weights(const Array<int64_t>& words, int64_t threshold, float scale, const Array<int64_t>& lines,
                       int64_t line_width, Array<float>& score, Array<float>& log_sum, int num_threads) {
  const auto place = place_of(words, threshold);
  const py::ssize_t num_lines = check_scores(score, log_sum, lines, line_width), width = score.shape(1);
  const taco::Lines numbers{lines.data(), 0};
  float *const score_data = score.mutable_data(), *const log_sum_data = log_sum.mutable_data();
  py::gil_scoped_release release;
  taco::attention_weights(place, scale, numbers, line_width, num_lines, width, score_data, log_sum_data, num_threads);
}

void attention_slopes(const Array<int64_t>& words, int64_t threshold, float scale, const Array<int64_t>& lines,
                      int64_t line_width, const Array<float>& log_sum, const Array<float>& inner, float slope_scale,
                      Array<float>& score, Array<float>& slope, int num_threads) {
  const auto place = place_of(words, threshold);
  const py::ssize_t num_lines = check_scores(score, log_sum, lines, line_width), width = score.shape(1);
  check_shape(inner, "inner", {num_lines});
  check_shape(slope, "slope", {num_lines, width});
  const taco::Lines numbers{lines.data(), 0};
  const float *const log_sum_data = log_sum.data(), *const inner_data = inner.data();
  float *const score_data = score.mutable_data(), *const slope_data = slope.mutable_data();
  py::gil_scoped_release release;
  taco::attention_slopes(place, scale, numbers, line_width, num_lines, width, log_sum_data, inner_data, slope_scale,
                         score_data, slope_data, num_threads);
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
  module.def("attention_weights", &attention_weights, "words"_a.noconvert(), "threshold"_a, "scale"_a,
             "lines"_a.noconvert(), "line_width"_a, "score"_a.noconvert(), "log_sum"_a.noconvert(), "num_threads"_a);
  module.def("attention_slopes", &attention_slopes, "words"_a.noconvert(), "threshold"_a, "scale"_a,
             "lines"_a.noconvert(), "line_width"_a, "log_sum"_a.noconvert(), "inner"_a.noconvert(), "slope_scale"_a,
             "score"_a.noconvert(), "slope"_a.noconvert(), "num_threads"_a);
}

}  // namespace taco::python
