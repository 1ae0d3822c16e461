#include "text/unicode.hpp"

#include <algorithm>
#include <stdexcept>

#include "text/unicode_tables.hpp"

namespace taco {
namespace {

template <size_t Size>
void fill(std::vector<uint16_t>& kinds, const tables::Range (&ranges)[Size], CharKind kind) {
  for (const tables::Range& range : ranges) {
    std::fill(kinds.begin() + range.first, kinds.begin() + range.last + 1, kind);
  }
}

}  // namespace

Utf8 to_utf8(uint32_t c) {
  const auto tail = [](uint32_t bits) { return static_cast<char>(0x80 | (bits & 0x3F)); };
  if (c < 0x80) return {{static_cast<char>(c)}, 1};
  if (c < 0x800) return {{static_cast<char>(0xC0 | c >> 6), tail(c)}, 2};
  if (c < 0x10000) return {{static_cast<char>(0xE0 | c >> 12), tail(c >> 6), tail(c)}, 3};
  if (c > kMaxCodePoint) throw std::out_of_range("no code point: " + std::to_string(c));
  return {{static_cast<char>(0xF0 | c >> 18), tail(c >> 12), tail(c >> 6), tail(c)}, 4};
}

const CharTable& CharTable::get(bool is_cased) {
  static const CharTable uncased(false);
  if (!is_cased) return uncased;
  static const CharTable cased(true);
  return cased;
}

CharTable::CharTable(bool is_cased) : kinds_(kMaxCodePoint + 1, kOrdinary) {
  fill(kinds_, tables::kRemoved, kRemoved);
  fill(kinds_, tables::kSpaces, kSpace);
  fill(kinds_, tables::kIsolated, kIsolated);
  if (is_cased) return;
  fill(kinds_, tables::kStripped, kRemoved);
  fill(kinds_, tables::kBarriers, kBarrier);
  for (const tables::MarkRange& range : tables::kMarks) {
    std::fill(kinds_.begin() + range.first, kinds_.begin() + range.last + 1, kMark);
  }
  for (const tables::Shift& shift : tables::kShifts) {
    for (uint32_t c = shift.from; c <= shift.last; c += shift.step) {
      replace(c, {{static_cast<uint32_t>(static_cast<int32_t>(c) + shift.delta)}, 1});
    }
  }
  for (const tables::Change& change : tables::kChanges) {
    const auto count = std::count_if(std::begin(change.to), std::end(change.to), [](uint32_t c) { return c != 0; });
    replace(change.from, {{change.to[0], change.to[1], change.to[2]}, static_cast<int>(count)});
  }
  replace_hangul();
}

int CharTable::combining_class(uint32_t code_point) const {
  if (kinds_[code_point] != kMark) return 0;
  for (const tables::MarkRange& range : tables::kMarks) {
    if (range.first <= code_point && code_point <= range.last) return range.combining_class;
  }
  return 0;
}

void CharTable::replace(uint32_t code_point, const Replacement& replacement) {
  kinds_[code_point] = static_cast<uint16_t>(kReplaced + replacements_.size());
  replacements_.push_back(replacement);
}

// A Hangul syllable becomes its two or three letters by arithmetic: The Unicode Standard, section 3.12.
void CharTable::replace_hangul() {
  constexpr uint32_t kSyllables = 0xAC00, kLeads = 0x1100, kVowels = 0x1161, kTrails = 0x11A7;
  constexpr uint32_t kNumSyllables = 11172, kNumVowels = 21, kNumTrails = 28;
  for (uint32_t i = 0; i < kNumSyllables; ++i) {
    const uint32_t lead = kLeads + i / (kNumVowels * kNumTrails), vowel = kVowels + i / kNumTrails % kNumVowels;
    const uint32_t trail = i % kNumTrails;
    replace(kSyllables + i, {{lead, vowel, kTrails + trail}, trail == 0 ? 2 : 3});
  }
}

}  // namespace taco
