#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "step/levels.hpp"
#include "taco/step.hpp"
#include "taco/threads.hpp"

namespace taco {
namespace {

constexpr int64_t kLanes = 16;  // partial results, so that the compiler may use vectors

// e^x for x <= 0, to 2e-7 of it, and 0 below -87; NaN for NaN. As Cephes does: 2^n e^r with |r| <= ln 2 / 2.
TACO_INLINE float exp_of_negative(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const float shifted = x * 1.44269504f + kRound;
  int32_t bits, one_bits;
  std::memcpy(&bits, &shifted, 4);
  std::memcpy(&one_bits, &kRound, 4);
  const float n = shifted - kRound;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // Unsigned, because the bits of a NaN may be anything.
  const uint32_t power_bits = (static_cast<uint32_t>(bits) - static_cast<uint32_t>(one_bits) + 127u) << 23;
  float power;
  std::memcpy(&power, &power_bits, 4);
  return x < -87.0f ? 0.0f : p * power;
}

TACO_FOR_EACH_PROCESSOR
void weigh_lines(const DropoutPlace& place, float scale, Lines lines, int64_t line_blocks, int64_t begin, int64_t end,
                 int64_t width, uint16_t* levels, float* score, float* log_sum) {
  const uint16_t threshold = static_cast<uint16_t>(place.threshold);
  for (int64_t i = begin; i < end; ++i) {
    float* const row = score + i * width;
    float highest[kLanes], sum[kLanes] = {};
    std::fill(highest, highest + kLanes, -std::numeric_limits<float>::infinity());
    const int64_t whole = width / kLanes * kLanes;
    for (int64_t e = 0; e < whole; e += kLanes) {
      for (int64_t l = 0; l < kLanes; ++l) highest[l] = row[e + l] > highest[l] ? row[e + l] : highest[l];
    }
    float most = *std::max_element(highest, highest + kLanes);
    for (int64_t e = whole; e < width; ++e) most = std::max(most, row[e]);
    for (int64_t e = 0; e < whole; e += kLanes) {
      for (int64_t l = 0; l < kLanes; ++l) {
        row[e + l] = exp_of_negative(row[e + l] - most);
        sum[l] += row[e + l];
      }
    }
    float total = 0.0f;
    for (int64_t e = whole; e < width; ++e) total += row[e] = exp_of_negative(row[e] - most);
    for (int64_t half = kLanes / 2; half > 0; half /= 2) {
      for (int64_t l = 0; l < half; ++l) sum[l] += sum[l + half];
    }
    total += sum[0];
    log_sum[i] = most + std::log(total);
    const float factor = scale / total;
    if (threshold == 0) {
      for (int64_t e = 0; e < width; ++e) row[e] *= factor;
    } else {
      draw_blocks(place, lines[i] * line_blocks, width, levels);
      for (int64_t e = 0; e < width; ++e) row[e] *= levels[e] >= threshold ? factor : 0.0f;
    }
  }
}

TACO_FOR_EACH_PROCESSOR
void slope_lines(const DropoutPlace& place, float scale, Lines lines, int64_t line_blocks, int64_t begin, int64_t end,
                 int64_t width, uint16_t* levels, const float* log_sum, const float* inner, float slope_scale,
                 float* score, float* slope) {
  const uint16_t threshold = static_cast<uint16_t>(place.threshold);
  for (int64_t i = begin; i < end; ++i) {
    float *const row = score + i * width, *const change = slope + i * width;
    const float log_total = log_sum[i], mean = inner[i];
    if (threshold == 0) {
      for (int64_t e = 0; e < width; ++e) {
        row[e] = exp_of_negative(row[e] - log_total);
        change[e] = row[e] * (change[e] - mean) * slope_scale;
      }
    } else {
      draw_blocks(place, lines[i] * line_blocks, width, levels);
      for (int64_t e = 0; e < width; ++e) {
        const float weight = exp_of_negative(row[e] - log_total), factor = levels[e] >= threshold ? scale : 0.0f;
        row[e] = weight * factor;
        change[e] = weight * (change[e] * factor - mean) * slope_scale;
      }
    }
  }
}

// Calls work(begin, end, levels) for tasks of lines.
template <typename Work>
void for_lines(int64_t num_lines, int64_t width, int num_threads, Work work) {
  if (num_lines == 0 || width == 0) return;
  const int64_t size = lines_per_task(width);
  for_each_task((num_lines + size - 1) / size, num_threads, [&](int64_t task) {
    std::vector<uint16_t> levels(static_cast<size_t>(round_up_to_chunk(width)));
    work(task * size, std::min((task + 1) * size, num_lines), levels.data());
  });
}

}  // namespace

void attention_weights(const DropoutPlace& place, float scale, Lines lines, int64_t line_width, int64_t num_lines,
                       int64_t width, float* score, float* log_sum, int num_threads) {
  for_lines(num_lines, width, num_threads, [&](int64_t begin, int64_t end, uint16_t* levels) {
    weigh_lines(place, scale, lines, blocks_of(line_width), begin, end, width, levels, score, log_sum);
  });
}

void attention_slopes(const DropoutPlace& place, float scale, Lines lines, int64_t line_width, int64_t num_lines,
                      int64_t width, const float* log_sum, const float* inner, float slope_scale, float* score,
                      float* slope, int num_threads) {
  for_lines(num_lines, width, num_threads, [&](int64_t begin, int64_t end, uint16_t* levels) {
    slope_lines(place, scale, lines, blocks_of(line_width), begin, end, width, levels, log_sum, inner, slope_scale,
                score, slope);
  });
}

}  // namespace taco
