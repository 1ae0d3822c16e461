// The element-wise work of an encoder layer on a CPU, in fp32: dropout whose mask is a function of a counter, dropout +
// residual + LayerNorm in one pass over each row, and softmax + dropout of attention's scores.
//
// The mask. What drops together is a line of `width` elements: the features of a token, or one head's attention weights
// of a query. Element e of line n is half-word e % 8 of block n * ceil(width / 8) + e / 8, low halves first. A block is
// one call of Philox 4x32 with 7 rounds, which pass BigCrush (Salmon et al. 2011, "Parallel Random Numbers: As Easy as
// 1, 2, 3"), with counter (block, low; block, high 16 bits | place << 16; micro-batch, low; micro-batch, high). An
// element is kept if its half-word is at least `threshold`. The twin in torch is pretrain/kernels/dropout_mask.py.
#pragma once

#include <cstdint>

namespace taco {

// What keys the mask of one place in the model and one micro-batch.
struct DropoutPlace {
  uint32_t key[2];
  uint32_t place;  // shifted left by 16 bits
  uint32_t micro_batch[2];
  uint32_t threshold;  // 0 .. 65535; 0 keeps everything, and no number is drawn
};

// The numbers of an array's lines: number[i], or first + i without numbers.
struct Lines {
  const int64_t* number;
  int64_t first;
  int64_t operator[](int64_t i) const { return number == nullptr ? first + i : number[i]; }
};

// keep[i, e], [num_lines, width]: whether element e of line i is kept.
void fill_keep(const DropoutPlace& place, Lines lines, int64_t num_lines, int64_t width, bool* keep, int num_threads);

// out = in * scale where kept, else 0, both [num_lines, width]; they may be the same array.
void drop(const DropoutPlace& place, float scale, Lines lines, int64_t num_lines, int64_t width, const float* in,
          float* out, int num_threads);

// out = LayerNorm(residual + dropped(hidden)) * weight + bias, [num_lines, width], width >= 1;
// rstd[num_lines] = 1 / sqrt(variance + eps). hidden and out may be the same array.
void add_norm(const DropoutPlace& place, float scale, Lines lines, int64_t num_lines, int64_t width,
              const float* hidden, const float* residual, const float* weight, const float* bias, float eps, float* out,
              float* rstd, int num_threads);

// Gradients of add_norm, from its output `out` and `rstd`: the normalised row is (out - bias) / weight, and 0 where the
// weight is 0. grad_hidden and grad_residual [num_lines, width]; grad_weight and grad_bias [width] are sums over lines.
void add_norm_backward(const DropoutPlace& place, float scale, Lines lines, int64_t num_lines, int64_t width,
                       const float* grad, const float* out, const float* rstd, const float* weight, const float* bias,
                       float* grad_hidden, float* grad_residual, float* grad_weight, float* grad_bias, int num_threads);

// The weights of attention from its scores, in place, [num_lines, width]: softmax of each line, times `scale` where kept
// and 0 elsewhere. log_sum[num_lines] is the logarithm of the sum of e^score. A line of the mask has `line_width`
// elements, of which the first `width` are drawn.
void attention_weights(const DropoutPlace& place, float scale, Lines lines, int64_t line_width, int64_t num_lines,
                       int64_t width, float* score, float* log_sum, int num_threads);

// Backward: `score` becomes the weights as above; `slope`, the gradient of the dropped weights, becomes that of the
// scores times `slope_scale`. inner[num_lines] is the sum of dropped weight times gradient over a line.
void attention_slopes(const DropoutPlace& place, float scale, Lines lines, int64_t line_width, int64_t num_lines,
                      int64_t width, const float* log_sum, const float* inner, float slope_scale, float* score,
                      float* slope, int num_threads);

}  // namespace taco
