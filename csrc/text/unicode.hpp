// What BERT's normalizer and pre-tokenizer make of each code point, as the `tokenizers` library does it.
//
// uncased: control characters go, CJK ideographs and punctuation stand alone, canonical decomposition (NFD), accents
// (Mn) go, lower case. cased: only the first two. All of that is decided per code point, with one exception: NFD sorts
// neighbouring marks by their combining class. Most marks are accents and go; the few that stay have a class here, and
// the reader of a text sorts them.
//
// The tables behind it were asked of the library by csrc/text/generate_unicode_tables.py.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace taco {

constexpr uint32_t kMaxCodePoint = 0x10FFFF;

enum CharKind : uint16_t {
  kOrdinary,  // a letter of a word, kept as it is
  kRemoved,   // as if it were not there
  kSpace,     // ends a word
  kIsolated,  // a word of its own
  kMark,      // ordinary, with a combining class: moves before marks of a higher one that stand right before it
  kBarrier,   // removed, but no mark moves past it
  kReplaced   // this and above: replacement(kind) stands for it
};

// UTF-8 of one code point: `size` bytes of `bytes`.
struct Utf8 {
  std::array<char, 4> bytes;
  int size;
};
Utf8 to_utf8(uint32_t code_point);

struct Replacement {
  std::array<uint32_t, 3> code_points;  // each ordinary, isolated or a mark
  int count;
};

// Immutable and shared: 2.2 MB for each casing in use, built at the first call.
class CharTable {
 public:
  static const CharTable& get(bool is_cased);

  // kReplaced or above: give it to replacement(). code_point must not exceed kMaxCodePoint.
  uint16_t kind(uint32_t code_point) const { return kinds_[code_point]; }
  const Replacement& replacement(uint16_t kind) const { return replacements_[kind - kReplaced]; }

  // Canonical combining class of a kMark; 0 for anything else.
  int combining_class(uint32_t code_point) const;

 private:
  explicit CharTable(bool is_cased);
  void replace(uint32_t code_point, const Replacement& replacement);
  void replace_hangul();

  std::vector<uint16_t> kinds_;  // by code point
  std::vector<Replacement> replacements_;
};

}  // namespace taco
