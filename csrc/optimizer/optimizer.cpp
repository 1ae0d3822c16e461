// The loops are compiled twice, for AVX2 and for AVX-512, and the processor chooses. Both give the same bits: products and
// sums are rounded one by one (the build turns contraction off), except where std::fma is written.
#include "taco/optimizer.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "taco/threads.hpp"

#define TACO_INLINE inline __attribute__((always_inline))

namespace taco {
namespace {

constexpr int64_t kTask = 1 << 16;  // elements of a task: their state fills an L2 cache
constexpr int64_t kLanes = 16;

enum class Width { none, avx2, avx512 };

Width find_width() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return Width::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Width::avx2;
#endif
  return Width::none;
}

Width width() {
  static const Width found = find_width();
  return found;
}

// Calls the loop `body`, compiled for this processor.
#if defined(__x86_64__)
template <typename Body>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))) void run_avx512(const Body& body) {
  body();
}
template <typename Body>
__attribute__((target("avx2,fma"))) void run_avx2(const Body& body) {
  body();
}
#endif

template <typename Body>
void run(const Body& body) {
#if defined(__x86_64__)
  if (width() == Width::avx512) return run_avx512(body);
  if (width() == Width::avx2) return run_avx2(body);
#endif
  throw std::runtime_error("the optimizer's loops need a processor with AVX2 and FMA");
}

TACO_INLINE float as_float(float x) { return x; }
TACO_INLINE float as_float(Bf16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

TACO_INLINE void store(float* to, float x) { *to = x; }
TACO_INLINE void store(Bf16* to, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  to->bits = static_cast<uint16_t>(x != x ? 0x7FC0 : rounded);
}

// The numbers of a step, computed in fp64 and rounded once.
struct Numbers {
  explicit Numbers(const MomentSettings& s)
      : scale(static_cast<float>(s.gradient_scale)),
        rate1(static_cast<float>(1 - s.beta1)),
        beta2(static_cast<float>(s.beta2)),
        rate2(static_cast<float>(1 - s.beta2)),
        correction1(static_cast<float>(1 - std::pow(s.beta1, s.step))),
        correction2(static_cast<float>(1 - std::pow(s.beta2, s.step))),
        eps(static_cast<float>(s.eps)),
        weight_decay(static_cast<float>(s.weight_decay)) {}
  float scale, rate1, beta2, rate2, correction1, correction2, eps, weight_decay;
};

TACO_INLINE float next_mean(float mean, float gradient, float rate1) {
  return std::fma(rate1, gradient - mean, mean);
}

TACO_INLINE float next_square(float square, float gradient, float beta2, float rate2) {
  return std::fma(rate2 * gradient, gradient, square * beta2);
}

TACO_INLINE float lamb_update(float weight, float mean, float square, const Numbers& n) {
  return (mean / n.correction1) / (std::sqrt(square / n.correction2) + n.eps) + n.weight_decay * weight;
}

TACO_INLINE double add_lanes(const double* lanes) {
  double sum = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
  return sum;
}

// -- the loops; numbers are passed by value, so that the compiler sees that no store changes them --

template <typename Gradient>
TACO_INLINE void adamw_loop(int64_t length, float* __restrict weight, const Gradient* __restrict gradient,
                            float* __restrict exp_avg, float* __restrict exp_avg_sq, const Numbers n, const float kept,
                            const float rate, const float root2) {
  for (int64_t i = 0; i < length; ++i) {
    const float g = as_float(gradient[i]) * n.scale;
    const float mean = next_mean(exp_avg[i], g, n.rate1);
    const float square = next_square(exp_avg_sq[i], g, n.beta2, n.rate2);
    exp_avg[i] = mean;
    exp_avg_sq[i] = square;
    weight[i] = weight[i] * kept + rate * mean / (std::sqrt(square) / root2 + n.eps);
  }
}

template <typename Gradient>
TACO_INLINE SquareSums moments_loop(int64_t length, const float* __restrict weight,
                                    const Gradient* __restrict gradient, float* __restrict exp_avg,
                                    float* __restrict exp_avg_sq, const Numbers n) {
  double weights[kLanes] = {}, updates[kLanes] = {};
  int64_t begin = 0;
  for (; begin < length; begin += kLanes) {
    const int64_t count = std::min(kLanes, length - begin);
    float update[kLanes] = {}, old[kLanes] = {};
    for (int64_t lane = 0; lane < count; ++lane) {
      const int64_t i = begin + lane;
      const float g = as_float(gradient[i]) * n.scale;
      const float mean = next_mean(exp_avg[i], g, n.rate1);
      const float square = next_square(exp_avg_sq[i], g, n.beta2, n.rate2);
      exp_avg[i] = mean;
      exp_avg_sq[i] = square;
      old[lane] = weight[i];
      update[lane] = lamb_update(weight[i], mean, square, n);
    }
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      weights[lane] += static_cast<double>(old[lane]) * old[lane];
      updates[lane] += static_cast<double>(update[lane]) * update[lane];
    }
  }
  return {add_lanes(weights), add_lanes(updates)};
}

TACO_INLINE void weights_loop(int64_t length, float* __restrict weight, const float* __restrict exp_avg,
                              const float* __restrict exp_avg_sq, const float rate, const Numbers n) {
  for (int64_t i = 0; i < length; ++i) weight[i] -= rate * lamb_update(weight[i], exp_avg[i], exp_avg_sq[i], n);
}

template <typename Copy>
TACO_INLINE void copy_loop(int64_t length, const float* __restrict weight, Copy* __restrict copy) {
  for (int64_t i = 0; i < length; ++i) store(copy + i, weight[i]);
}

template <typename Element>
TACO_INLINE double squares_loop(int64_t length, const Element* elements) {
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= length; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const double x = as_float(elements[i + lane]);
      lanes[lane] += x * x;
    }
  }
  for (; i < length; ++i) {
    const double x = as_float(elements[i]);
    lanes[0] += x * x;
  }
  return add_lanes(lanes);
}

// A part of a segment that one task works on.
struct Piece {
  int64_t segment, start, length;
};

std::vector<Piece> cut(const std::vector<Segment>& segments) {
  std::vector<Piece> pieces;
  for (size_t i = 0; i < segments.size(); ++i) {
    for (int64_t done = 0; done < segments[i].length; done += kTask) {
      pieces.push_back(
          {static_cast<int64_t>(i), segments[i].start + done, std::min(kTask, segments[i].length - done)});
    }
  }
  return pieces;
}

// Threads that are worth their start.
int useful_threads(int64_t num_elements, int num_threads) {
  return static_cast<int>(std::clamp<int64_t>(num_elements / (4 * kTask), 1, std::max(num_threads, 1)));
}

int64_t count_elements(const std::vector<Segment>& segments) {
  int64_t sum = 0;
  for (const Segment& segment : segments) sum += segment.length;
  return sum;
}

}  // namespace

bool can_update_buffers() { return width() != Width::none; }

template <typename Gradient, typename Copy>
void update_adamw(const FlatBuffer<Gradient, Copy>& buffer, double lr, const MomentSettings& settings,
                  int num_threads) {
  const Numbers n(settings);
  const float kept = static_cast<float>(1 - lr * settings.weight_decay);
  const float rate = static_cast<float>(-lr / (1 - std::pow(settings.beta1, settings.step)));
  const float root2 = static_cast<float>(std::sqrt(1 - std::pow(settings.beta2, settings.step)));
  const int64_t num_tasks = (buffer.size + kTask - 1) / kTask;
  for_each_task(num_tasks, useful_threads(buffer.size, num_threads), [&](int64_t task) {
    const int64_t start = task * kTask, length = std::min(kTask, buffer.size - start);
    Copy* const copy = buffer.copy == nullptr ? nullptr : buffer.copy + start;
    run([&]() __attribute__((always_inline)) {
      adamw_loop(length, buffer.weight + start, buffer.gradient + start, buffer.exp_avg + start,
                 buffer.exp_avg_sq + start, n, kept, rate, root2);
      if (copy != nullptr) copy_loop(length, buffer.weight + start, copy);
    });
  });
}

template <typename Gradient, typename Copy>
std::vector<SquareSums> update_lamb_moments(const FlatBuffer<Gradient, Copy>& buffer,
                                            const std::vector<Segment>& segments, const MomentSettings& settings,
                                            int num_threads) {
  const Numbers n(settings);
  const std::vector<Piece> pieces = cut(segments);
  std::vector<SquareSums> of_pieces(pieces.size());
  const int threads = useful_threads(count_elements(segments), num_threads);
  for_each_task(static_cast<int64_t>(pieces.size()), threads, [&](int64_t task) {
    const Piece piece = pieces[task];
    run([&]() __attribute__((always_inline)) {
      of_pieces[task] = moments_loop(piece.length, buffer.weight + piece.start, buffer.gradient + piece.start,
                                     buffer.exp_avg + piece.start, buffer.exp_avg_sq + piece.start, n);
    });
  });
  std::vector<SquareSums> sums(segments.size(), {0, 0});
  for (size_t i = 0; i < pieces.size(); ++i) {
    sums[pieces[i].segment].weight += of_pieces[i].weight;
    sums[pieces[i].segment].update += of_pieces[i].update;
  }
  return sums;
}

template <typename Copy>
void update_lamb_weights(const FlatBuffer<float, Copy>& buffer, const std::vector<Segment>& segments,
                         const std::vector<double>& rates, const MomentSettings& settings, int num_threads) {
  const Numbers n(settings);
  const std::vector<Piece> pieces = cut(segments);
  const int threads = useful_threads(count_elements(segments), num_threads);
  for_each_task(static_cast<int64_t>(pieces.size()), threads, [&](int64_t task) {
    const Piece piece = pieces[task];
    const float rate = static_cast<float>(rates[piece.segment]);
    Copy* const copy = buffer.copy == nullptr ? nullptr : buffer.copy + piece.start;
    run([&]() __attribute__((always_inline)) {
      weights_loop(piece.length, buffer.weight + piece.start, buffer.exp_avg + piece.start,
                   buffer.exp_avg_sq + piece.start, rate, n);
      if (copy != nullptr) copy_loop(piece.length, buffer.weight + piece.start, copy);
    });
  });
}

template <typename Element>
double sum_squares(int64_t size, const Element* elements, int num_threads) {
  std::vector<double> of_tasks((size + kTask - 1) / kTask);
  for_each_task(static_cast<int64_t>(of_tasks.size()), useful_threads(size, num_threads), [&](int64_t task) {
    const Element* const part = elements + task * kTask;
    const int64_t length = std::min(kTask, size - task * kTask);
    run([&]() __attribute__((always_inline)) { of_tasks[task] = squares_loop(length, part); });
  });
  double sum = 0;
  for (const double part : of_tasks) sum += part;
  return sum;
}

#define TACO_INSTANTIATE(Gradient, Copy)                                                                           \
  template void update_adamw(const FlatBuffer<Gradient, Copy>&, double, const MomentSettings&, int);               \
  template std::vector<SquareSums> update_lamb_moments(const FlatBuffer<Gradient, Copy>&, const std::vector<Segment>&, \
                                                       const MomentSettings&, int);
TACO_INSTANTIATE(float, float)
TACO_INSTANTIATE(float, Bf16)
TACO_INSTANTIATE(Bf16, float)
TACO_INSTANTIATE(Bf16, Bf16)
template void update_lamb_weights(const FlatBuffer<float, float>&, const std::vector<Segment>&,
                                  const std::vector<double>&, const MomentSettings&, int);
template void update_lamb_weights(const FlatBuffer<float, Bf16>&, const std::vector<Segment>&,
                                  const std::vector<double>&, const MomentSettings&, int);
template double sum_squares(int64_t, const float*, int);
template double sum_squares(int64_t, const Bf16*, int);

}  // namespace taco
