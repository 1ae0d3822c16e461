// Tests of an encoder layer's element-wise work: which units drop, sums and gradients. Prints failures and exits with 1.
// Comparisons with torch are in tests/model/test_dropout.py and tests/kernels/test_add_norm.py.
#include <cmath>
#include <cstdint>
#include <memory>
#include <vector>

#include "check.hpp"
#include "taco/step.hpp"

namespace {

const taco::DropoutPlace kPlace{{7, 0x44524F50}, 9u << 16, {3, 0}, 19661};  // drops 0.3

using Floats = std::vector<float>;

Floats numbers(int64_t size, float factor) {
  Floats values(static_cast<size_t>(size));
  for (int64_t i = 0; i < size; ++i) values[static_cast<size_t>(i)] = std::sin(factor * static_cast<float>(i + 1));
  return values;
}

// A line drops the same alone, among others, under a number and with more threads.
void test_lines() {
  for (const int64_t width : {1, 8, 300, 40000}) {
    const int64_t num_lines = 5;
    const auto all = std::make_unique<bool[]>(static_cast<size_t>(num_lines * width));
    const auto some = std::make_unique<bool[]>(static_cast<size_t>(2 * width));
    taco::fill_keep(kPlace, {nullptr, 100}, num_lines, width, all.get(), 3);
    const int64_t lines[] = {104, 101};
    taco::fill_keep(kPlace, {lines, 0}, 2, width, some.get(), 1);
    int64_t num_wrong = 0, num_kept = 0;
    for (int64_t e = 0; e < width; ++e) {
      num_wrong += some[e] != all[4 * width + e] || some[width + e] != all[width + e];
    }
    for (int64_t i = 0; i < num_lines * width; ++i) num_kept += all[i];
    CHECK(num_wrong == 0);
    if (width == 40000) CHECK(std::abs(static_cast<double>(num_kept) / (5.0 * 40000.0) - 0.7) < 0.005);

    const Floats in = numbers(num_lines * width, 0.7f);
    Floats out(in.size());
    taco::drop(kPlace, 2.0f, {nullptr, 100}, num_lines, width, in.data(), out.data(), 2);
    for (size_t i = 0; i < in.size(); ++i) num_wrong += out[i] != (all[i] ? 2.0f * in[i] : 0.0f);
    CHECK(num_wrong == 0);
  }
}

struct Result {
  Floats out, rstd, grad_hidden, grad_residual, grad_weight, grad_bias;
  bool operator==(const Result& other) const {
    return out == other.out && grad_hidden == other.grad_hidden && grad_residual == other.grad_residual &&
           grad_weight == other.grad_weight && grad_bias == other.grad_bias;
  }
};

Result add_norm(int64_t num_lines, int64_t width, int num_threads) {
  const auto size = static_cast<size_t>(num_lines * width), features = static_cast<size_t>(width);
  const Floats hidden = numbers(num_lines * width, 0.7f), residual = numbers(num_lines * width, 1.3f),
               grad = numbers(num_lines * width, 2.1f), bias = numbers(width, 0.3f);
  Floats weight = numbers(width, 0.9f);
  for (float& value : weight) value = 1.0f + 0.5f * value;
  Result result{Floats(size),    Floats(static_cast<size_t>(num_lines)), Floats(size), Floats(size), Floats(features),
                Floats(features)};
  taco::add_norm(kPlace, 1.5f, {nullptr, 0}, num_lines, width, hidden.data(), residual.data(), weight.data(),
                 bias.data(), 1e-12f, result.out.data(), result.rstd.data(), num_threads);
  taco::add_norm_backward(kPlace, 1.5f, {nullptr, 0}, num_lines, width, grad.data(), result.out.data(),
                          result.rstd.data(), weight.data(), bias.data(), result.grad_hidden.data(),
                          result.grad_residual.data(), result.grad_weight.data(), result.grad_bias.data(), num_threads);
  return result;
}

void test_add_norm() {
  const int64_t num_lines = 300, width = 260;
  const Result one = add_norm(num_lines, width, 1);
  CHECK(one == add_norm(num_lines, width, 4));
  const auto keep = std::make_unique<bool[]>(static_cast<size_t>(num_lines * width));
  taco::fill_keep(kPlace, {nullptr, 0}, num_lines, width, keep.get(), 1);
  int64_t num_wrong = 0;
  for (int64_t line = 0; line < num_lines; ++line) {
    double sum = 0.0;  // a constant added to a row changes nothing, so its gradients add up to 0
    for (int64_t e = 0; e < width; ++e) {
      const auto i = static_cast<size_t>(line * width + e);
      sum += one.grad_residual[i];
      num_wrong += one.grad_hidden[i] != (keep[i] ? 1.5f * one.grad_residual[i] : 0.0f);
    }
    num_wrong += std::abs(sum) > 1e-3;
  }
  CHECK(num_wrong == 0);
}

}  // namespace

int main() {
  test_lines();
  test_add_norm();
  return num_failed == 0 ? 0 : 1;
}
