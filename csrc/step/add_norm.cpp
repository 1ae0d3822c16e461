#include <algorithm>
#include <cmath>
#include <vector>

#include "step/levels.hpp"
#include "taco/step.hpp"
#include "taco/threads.hpp"

namespace taco {
namespace {

constexpr int64_t kLanes = 16;  // partial sums, so that the compiler may add with vectors

// Sum of term(e) over e in 0 .. width - 1.
template <typename Term>
TACO_INLINE float sum_over(int64_t width, Term term) {
  float lanes[kLanes] = {};
  int64_t e = 0;
  for (; e + kLanes <= width; e += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) lanes[l] += term(e + l);
  }
  float sum = 0.0f;
  for (; e < width; ++e) sum += term(e);
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  }
  return sum + lanes[0];
}

TACO_FOR_EACH_PROCESSOR
void norm_lines(const DropoutPlace& place, float scale, Lines lines, int64_t begin, int64_t end, int64_t width,
                uint16_t* levels, float* sum, const float* hidden, const float* residual, const float* weight,
                const float* bias, float eps, float* out, float* rstd) {
  const uint16_t threshold = static_cast<uint16_t>(place.threshold);
  const float share = 1.0f / static_cast<float>(width);
  for (int64_t i = begin; i < end; ++i) {
    const float *const from = hidden + i * width, *const added = residual + i * width;
    if (threshold == 0) {
      for (int64_t e = 0; e < width; ++e) sum[e] = added[e] + from[e];
    } else {
      draw_line(place, lines[i], width, levels);
      for (int64_t e = 0; e < width; ++e) sum[e] = added[e] + from[e] * (levels[e] >= threshold ? scale : 0.0f);
    }
    const float mean = share * sum_over(width, [&](int64_t e) { return sum[e]; });
    const float variance = share * sum_over(width, [&](int64_t e) { return (sum[e] - mean) * (sum[e] - mean); });
    const float inverse = 1.0f / std::sqrt(variance + eps);
    float* const to = out + i * width;
    for (int64_t e = 0; e < width; ++e) to[e] = (sum[e] - mean) * inverse * weight[e] + bias[e];
    rstd[i] = inverse;
  }
}

// inverse[e] = 1 / weight[e], or 0: see add_norm_backward.
TACO_FOR_EACH_PROCESSOR
void norm_lines_backward(const DropoutPlace& place, float scale, Lines lines, int64_t begin, int64_t end, int64_t width,
                         uint16_t* levels, float* normal, const float* grad, const float* out, const float* rstd,
                         const float* weight, const float* inverse, const float* bias, float* grad_hidden,
                         float* grad_residual, float* grad_weight, float* grad_bias) {
  const uint16_t threshold = static_cast<uint16_t>(place.threshold);
  const float share = 1.0f / static_cast<float>(width);
  for (int64_t i = begin; i < end; ++i) {
    const float *const slope = grad + i * width, *const value = out + i * width;
    for (int64_t e = 0; e < width; ++e) {
      normal[e] = (value[e] - bias[e]) * inverse[e];
      grad_weight[e] += slope[e] * normal[e];
      grad_bias[e] += slope[e];
    }
    const float mean = share * sum_over(width, [&](int64_t e) { return slope[e] * weight[e]; });
    const float along = share * sum_over(width, [&](int64_t e) { return slope[e] * weight[e] * normal[e]; });
    float *const to = grad_hidden + i * width, *const added = grad_residual + i * width;
    for (int64_t e = 0; e < width; ++e) added[e] = rstd[i] * (slope[e] * weight[e] - mean - normal[e] * along);
    if (threshold == 0) {
      std::copy(added, added + width, to);
    } else {
      draw_line(place, lines[i], width, levels);
      for (int64_t e = 0; e < width; ++e) to[e] = added[e] * (levels[e] >= threshold ? scale : 0.0f);
    }
  }
}

}  // namespace

void add_norm(const DropoutPlace& place, float scale, Lines lines, int64_t num_lines, int64_t width,
              const float* hidden, const float* residual, const float* weight, const float* bias, float eps, float* out,
              float* rstd, int num_threads) {
  const int64_t size = lines_per_task(width);
  for_each_task((num_lines + size - 1) / size, num_threads, [&](int64_t task) {
    std::vector<uint16_t> levels(static_cast<size_t>(round_up_to_chunk(width)));
    std::vector<float> sum(static_cast<size_t>(width));
    norm_lines(place, scale, lines, task * size, std::min((task + 1) * size, num_lines), width, levels.data(),
               sum.data(), hidden, residual, weight, bias, eps, out, rstd);
  });
}

void add_norm_backward(const DropoutPlace& place, float scale, Lines lines, int64_t num_lines, int64_t width,
                       const float* grad, const float* out, const float* rstd, const float* weight, const float* bias,
                       float* grad_hidden, float* grad_residual, float* grad_weight, float* grad_bias,
                       int num_threads) {
  const int64_t size = lines_per_task(width), num_tasks = (num_lines + size - 1) / size;
  std::vector<float> inverse(static_cast<size_t>(width));
  for (int64_t e = 0; e < width; ++e) inverse[e] = weight[e] == 0.0f ? 0.0f : 1.0f / weight[e];
  // Each task sums its own lines, and the tasks' sums are added in order: the same bits for any number of threads.
  std::vector<float> sums(static_cast<size_t>(2 * width * num_tasks));
  for_each_task(num_tasks, num_threads, [&](int64_t task) {
    std::vector<uint16_t> levels(static_cast<size_t>(round_up_to_chunk(width)));
    std::vector<float> normal(static_cast<size_t>(width));
    float* const own = sums.data() + 2 * width * task;
    norm_lines_backward(place, scale, lines, task * size, std::min((task + 1) * size, num_lines), width, levels.data(),
                        normal.data(), grad, out, rstd, weight, inverse.data(), bias, grad_hidden, grad_residual, own,
                        own + width);
  });
  for (int64_t e = 0; e < width; ++e) {
    double weight_sum = 0.0, bias_sum = 0.0;
    for (int64_t task = 0; task < num_tasks; ++task) {
      weight_sum += sums[static_cast<size_t>(2 * width * task + e)];
      bias_sum += sums[static_cast<size_t>(2 * width * task + width + e)];
    }
    grad_weight[e] = static_cast<float>(weight_sum);
    grad_bias[e] = static_cast<float>(bias_sum);
  }
}

}  // namespace taco
