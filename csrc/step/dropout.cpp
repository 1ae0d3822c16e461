#include "taco/step.hpp"

#include <algorithm>
#include <vector>

#include "step/levels.hpp"
#include "taco/threads.hpp"

namespace taco {
namespace {

TACO_FOR_EACH_PROCESSOR
void keep_lines(const DropoutPlace& place, Lines lines, int64_t begin, int64_t end, int64_t width, uint16_t* levels,
                bool* keep) {
  const uint16_t threshold = static_cast<uint16_t>(place.threshold);
  for (int64_t i = begin; i < end; ++i) {
    draw_line(place, lines[i], width, levels);
    bool* const row = keep + i * width;
    for (int64_t e = 0; e < width; ++e) row[e] = levels[e] >= threshold;
  }
}

TACO_FOR_EACH_PROCESSOR
void drop_lines(const DropoutPlace& place, float scale, Lines lines, int64_t begin, int64_t end, int64_t width,
                uint16_t* levels, const float* in, float* out) {
  const uint16_t threshold = static_cast<uint16_t>(place.threshold);
  for (int64_t i = begin; i < end; ++i) {
    draw_line(place, lines[i], width, levels);
    const float* const from = in + i * width;
    float* const to = out + i * width;
    for (int64_t e = 0; e < width; ++e) to[e] = from[e] * (levels[e] >= threshold ? scale : 0.0f);
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

void fill_keep(const DropoutPlace& place, Lines lines, int64_t num_lines, int64_t width, bool* keep, int num_threads) {
  for_lines(num_lines, width, num_threads, [&](int64_t begin, int64_t end, uint16_t* levels) {
    keep_lines(place, lines, begin, end, width, levels, keep);
  });
}

void drop(const DropoutPlace& place, float scale, Lines lines, int64_t num_lines, int64_t width, const float* in,
          float* out, int num_threads) {
  for_lines(num_lines, width, num_threads, [&](int64_t begin, int64_t end, uint16_t* levels) {
    drop_lines(place, scale, lines, begin, end, width, levels, in, out);
  });
}

}  // namespace taco
