// Updates of flat fp32 buffers on a CPU: AdamW in one pass over memory, LAMB in two, and the sum of squares.
//
// Gradients are fp32 or bf16; a copy of the new weights may be written in the same pass, as fp32 or as bf16, rounded to
// the nearest, ties to even. Results do not depend on the number of threads. The buffers must not overlap.
#pragma once

#include <cstdint>
#include <vector>

namespace taco {

// A bf16 number: the upper half of an fp32 one.
struct Bf16 {
  uint16_t bits;
};

// Whether this processor has what the functions below are compiled for (AVX2 and FMA); they throw std::runtime_error if
// not.
bool can_update_buffers();

struct MomentSettings {
  double beta1, beta2, eps, weight_decay;
  double step;            // number of this update, from 1
  double gradient_scale;  // by which the gradient is multiplied first
};

// Weights, moments and, where they are not null, gradient and copy, of one buffer: size elements each.
template <typename Gradient, typename Copy>
struct FlatBuffer {
  int64_t size;
  float* weight;
  const Gradient* gradient;
  float* exp_avg;
  float* exp_avg_sq;
  Copy* copy;
};

// AdamW (Loshchilov and Hutter 2019), with the bits of torch's fused kernel in whole vector registers.
template <typename Gradient, typename Copy>
void update_adamw(const FlatBuffer<Gradient, Copy>& buffer, double lr, const MomentSettings& settings, int num_threads);

// The elements start .. start + length - 1 of a buffer: one parameter.
struct Segment {
  int64_t start, length;
};

// The sums of the squares of a parameter's weights and of its updates.
struct SquareSums {
  double weight, update;
};

// The first half of LAMB (You et al. 2020, algorithm 2): updates the moments of the segments. Returns sums for each.
template <typename Gradient, typename Copy>
std::vector<SquareSums> update_lamb_moments(const FlatBuffer<Gradient, Copy>& buffer,
                                            const std::vector<Segment>& segments, const MomentSettings& settings,
                                            int num_threads);

// The second half: weight -= rate * update in each segment, and its copy. Reads no gradient.
template <typename Copy>
void update_lamb_weights(const FlatBuffer<float, Copy>& buffer, const std::vector<Segment>& segments,
                         const std::vector<double>& rates, const MomentSettings& settings, int num_threads);

// The sum of the squares of all elements, in fp64.
template <typename Element>
double sum_squares(int64_t size, const Element* elements, int num_threads);

}  // namespace taco
