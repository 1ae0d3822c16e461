// Runs of ASCII letters and digits, 16 bytes at a time. Private to wordpiece.cpp.
//
// Every x86-64 machine has SSE2; elsewhere, or with TACO_PORTABLE defined, a plain loop does the same.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__) && !defined(TACO_PORTABLE)
#include <emmintrin.h>
#endif

namespace taco {

constexpr int kAsciiBlock = 16;

struct AsciiWord {
  int length;                   // number of leading letters and digits, 0 .. 16
  std::array<uint64_t, 2> key;  // their bytes, zero-padded
};

#if defined(__SSE2__) && !defined(TACO_PORTABLE)

// `fold` is ORed into each byte: 0x20 lowercases letters and leaves digits unchanged, 0 leaves all unchanged.
inline AsciiWord read_ascii_word(const char* text, char fold) {
  alignas(32) static constexpr uint8_t kOnes[32] = {255, 255, 255, 255, 255, 255, 255, 255,
                                                    255, 255, 255, 255, 255, 255, 255, 255};
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(text));
  const __m128i folded = _mm_or_si128(bytes, _mm_set1_epi8(0x20));
  // Signed comparison after shifting the range to the lowest values.
  const auto is_between = [](__m128i x, char first, int count) {
    const __m128i moved = _mm_add_epi8(x, _mm_set1_epi8(static_cast<char>(-128 - first)));
    return _mm_cmplt_epi8(moved, _mm_set1_epi8(static_cast<char>(-128 + count)));
  };
  const __m128i is_word = _mm_or_si128(is_between(folded, 'a', 26), is_between(bytes, '0', 10));
  const auto others = ~static_cast<uint32_t>(_mm_movemask_epi8(is_word));
  const int length = __builtin_ctz(others | 1u << kAsciiBlock);
  const __m128i keep = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kOnes + kAsciiBlock - length));
  const __m128i word = _mm_and_si128(_mm_or_si128(bytes, _mm_set1_epi8(fold)), keep);
  AsciiWord result;
  result.length = length;
  _mm_storeu_si128(reinterpret_cast<__m128i*>(result.key.data()), word);
  return result;
}

#else

inline AsciiWord read_ascii_word(const char* text, char fold) {
  char word[kAsciiBlock] = {};
  int length = 0;
  for (; length < kAsciiBlock; ++length) {
    const char small = static_cast<char>(text[length] | 0x20);
    if (!(small >= 'a' && small <= 'z') && !(text[length] >= '0' && text[length] <= '9')) break;
    word[length] = static_cast<char>(text[length] | fold);
  }
  AsciiWord result{length, {}};
  std::memcpy(result.key.data(), word, sizeof(word));
  return result;
}

#endif

}  // namespace taco
