// Updates of flat buffers. bf16 arrives as uint16, which NumPy has.
#include "taco/optimizer.hpp"

#include <pybind11/stl.h>

#include <optional>

#include "arrays.hpp"

namespace taco::python {
namespace {

MomentSettings read_settings(const py::dict& settings) {
  const auto number = [&](const char* name) { return settings[name].cast<double>(); };
  return {number("beta1"),        number("beta2"), number("eps"),
          number("weight_decay"), number("step"),  number("gradient_scale")};
}

// The elements of a contiguous fp32 or bf16 vector of `size` elements.
template <typename Element>
Element* elements(const py::array& array, py::ssize_t size, const char* name, bool is_written) {
  const bool has_type = std::is_same_v<Element, float> ? py::isinstance<py::array_t<float>>(array)
                                                       : py::isinstance<py::array_t<uint16_t>>(array);
  if (!has_type) throw py::type_error(std::string(name) + ": expected float32, or bf16 as uint16");
  if ((array.flags() & py::array::c_style) == 0) {
    throw std::invalid_argument(std::string(name) + ": the array is not contiguous");
  }
  check_shape(array, name, {size});
  if (is_written && !array.writeable()) throw std::invalid_argument(std::string(name) + ": the array is read-only");
  return static_cast<Element*>(const_cast<void*>(array.data()));
}

bool is_bf16(const py::array& array) { return py::isinstance<py::array_t<uint16_t>>(array); }

using Optional = std::optional<py::array>;

// Calls `work` with the buffer of these arrays; gradient and copy may be absent, and decide its type.
template <typename Work>
auto with_buffer(const py::array& weight, const Optional& gradient, const py::array& exp_avg,
                 const py::array& exp_avg_sq, const Optional& copy, const Work& work) {
  const py::ssize_t size = weight.size();
  float* const weights = elements<float>(weight, size, "weight", true);
  float* const means = elements<float>(exp_avg, size, "exp_avg", true);
  float* const squares = elements<float>(exp_avg_sq, size, "exp_avg_sq", true);
  const auto build = [&](auto gradient_type, auto copy_type) {
    using Gradient = decltype(gradient_type);
    using Copy = decltype(copy_type);
    const Gradient* const gradients =
        gradient ? elements<Gradient>(*gradient, size, "gradient", false) : nullptr;
    Copy* const copies = copy ? elements<Copy>(*copy, size, "copy", true) : nullptr;
    const FlatBuffer<Gradient, Copy> buffer{size, weights, gradients, means, squares, copies};
    return work(buffer);
  };
  const bool has_short_gradient = gradient && is_bf16(*gradient), has_short_copy = copy && is_bf16(*copy);
  if (has_short_gradient) return has_short_copy ? build(Bf16{}, Bf16{}) : build(Bf16{}, float{});
  return has_short_copy ? build(float{}, Bf16{}) : build(float{}, float{});
}

void adamw(const py::array& weight, const py::array& gradient, const py::array& exp_avg, const py::array& exp_avg_sq,
           const Optional& copy, double lr, const py::dict& settings, int num_threads) {
  const MomentSettings read = read_settings(settings);
  with_buffer(weight, gradient, exp_avg, exp_avg_sq, copy, [&](const auto& buffer) {
    const py::gil_scoped_release release;
    update_adamw(buffer, lr, read, num_threads);
  });
}

std::vector<Segment> read_segments(const Array<int64_t>& starts, const Array<int64_t>& lengths, py::ssize_t size) {
  check_vector(starts, "starts");
  check_shape(lengths, "lengths", {starts.size()});
  std::vector<Segment> segments;
  int64_t end = 0;
  for (py::ssize_t i = 0; i < starts.size(); ++i) {
    const Segment segment{starts.data()[i], lengths.data()[i]};
    if (segment.start < end || segment.length < 1 || segment.length > size - segment.start) {
      throw std::invalid_argument("segments must follow each other inside their buffer");
    }
    end = segment.start + segment.length;
    segments.push_back(segment);
  }
  return segments;
}

Array<double> lamb_moments(const py::array& weight, const py::array& gradient, const py::array& exp_avg,
                           const py::array& exp_avg_sq, const Array<int64_t>& starts, const Array<int64_t>& lengths,
                           const py::dict& settings, int num_threads) {
  const MomentSettings read = read_settings(settings);
  const std::vector<Segment> segments = read_segments(starts, lengths, weight.size());
  const std::vector<SquareSums> sums =
      with_buffer(weight, gradient, exp_avg, exp_avg_sq, std::nullopt, [&](const auto& buffer) {
        const py::gil_scoped_release release;
        return update_lamb_moments(buffer, segments, read, num_threads);
      });
  Array<double> result({static_cast<py::ssize_t>(sums.size()), py::ssize_t{2}});
  double* to = result.mutable_data();
  for (const SquareSums& sum : sums) {
    *to++ = sum.weight;
    *to++ = sum.update;
  }
  return result;
}

void lamb_weights(const py::array& weight, const py::array& exp_avg, const py::array& exp_avg_sq, const Optional& copy,
                  const Array<int64_t>& starts, const Array<int64_t>& lengths, const Array<double>& rates,
                  const py::dict& settings, int num_threads) {
  const MomentSettings read = read_settings(settings);
  const std::vector<Segment> segments = read_segments(starts, lengths, weight.size());
  check_shape(rates, "rates", {starts.size()});
  const std::vector<double> rate_list = to_vector<double>(rates, "rates");
  with_buffer(weight, std::nullopt, exp_avg, exp_avg_sq, copy, [&](const auto& buffer) {
    const py::gil_scoped_release release;
    using Copy = std::remove_pointer_t<decltype(buffer.copy)>;
    const FlatBuffer<float, Copy> plain{buffer.size,       buffer.weight,     nullptr,
                                        buffer.exp_avg, buffer.exp_avg_sq, buffer.copy};
    update_lamb_weights(plain, segments, rate_list, read, num_threads);
  });
}

double squares(const py::array& array, int num_threads) {
  const auto add = [&](const auto* data) {
    const py::gil_scoped_release release;
    return sum_squares(array.size(), data, num_threads);
  };
  if (is_bf16(array)) return add(elements<Bf16>(array, array.size(), "array", false));
  return add(elements<float>(array, array.size(), "array", false));
}

}  // namespace

void bind_optimizer(py::module_& module) {
  module.def("can_update_buffers", &can_update_buffers);
  module.def("adamw", &adamw, "weight"_a, "gradient"_a, "exp_avg"_a, "exp_avg_sq"_a, "copy"_a, py::kw_only(), "lr"_a,
             "settings"_a, "num_threads"_a);
  module.def("lamb_moments", &lamb_moments, "weight"_a, "gradient"_a, "exp_avg"_a, "exp_avg_sq"_a,
             "starts"_a.noconvert(), "lengths"_a.noconvert(), py::kw_only(), "settings"_a, "num_threads"_a);
  module.def("lamb_weights", &lamb_weights, "weight"_a, "exp_avg"_a, "exp_avg_sq"_a, "copy"_a, "starts"_a.noconvert(),
             "lengths"_a.noconvert(), "rates"_a.noconvert(), py::kw_only(), "settings"_a, "num_threads"_a);
  module.def("sum_squares", &squares, "array"_a, py::kw_only(), "num_threads"_a);
}

}  // namespace taco::python
