// What BERT's normalizer and pre-tokenizer do with each code point, as in the `tokenizers` library.
//
// uncased: control characters are removed, CJK ideographs and punctuation become separate words, canonical
// decomposition (NFD), accents (Mn) are removed, lowercasing. cased: only the first two. Each code point is handled by
// itself, with one exception: NFD sorts adjacent marks by combining class. Most marks are accents and removed; the few
// others have a class here, and the scanner of a text sorts them.
//
// csrc/text/generate_unicode_tables.py derived the tables from the library.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace taco {

constexpr uint32_t kMaxCodePoint = 0x10FFFF;

enum CharKind : uint16_t {
  kOrdinary,  // part of a word, unchanged
  kRemoved,   // ignored
  kSpace,     // ends a word
  kIsolated,  // a separate word
  kMark,      // ordinary, with a combining class: moves before directly preceding marks of a higher class
  kBarrier,   // removed, but no mark moves past it
  kReplaced   // this and above: replaced by replacement(kind)
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

  // kReplaced or above: pass it to replacement(). code_point must not exceed kMaxCodePoint.
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
