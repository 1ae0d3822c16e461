#include "sentences/sentence_abbreviations.hpp"

#include "sentences/sentence_characters.hpp"
#include "sentences/sentence_words.hpp"

namespace taco {
namespace {

using Kind = CharacterKind;

constexpr size_t kMaxWordBytes = 32;  // longer words before a full stop are not abbreviations

bool is_letter_of_words(const Character& character) {
  const Kind kind = kind_of(character.code);
  return kind == Kind::lower || kind == Kind::upper || kind == Kind::digit ||
         (kind == Kind::other && character.code >= 0x80);
}

bool is_apostrophe(char32_t code) { return code == U'\'' || code == U'’'; }

bool is_roman(std::string_view word) {
  return !word.empty() && word.size() <= 7 && word.find_first_not_of("IVXLC") == std::string_view::npos;
}

bool is_digits(std::string_view word) {
  return !word.empty() && word.find_first_not_of("0123456789") == std::string_view::npos;
}

// Whether it is a single letter of a script with case, of any number of bytes.
bool is_single_letter(std::string_view word) {
  const Character first = character_at(word, 0);
  const Kind kind = kind_of(first.code);
  return first.size == word.size() && (kind == Kind::lower || kind == Kind::upper);
}

// Calls `act` for each part of `word` between full stops.
template <typename Act>
void for_each_part(std::string_view word, Act act) {
  while (true) {
    const size_t dot = word.find('.');
    act(word.substr(0, dot));
    if (dot == std::string_view::npos) return;
    word.remove_prefix(dot + 1);
  }
}

// U.S, a.m, Ph.D: parts of one or two letters, or of up to four that begin with a capital.
bool is_dotted_abbreviation(std::string_view word) {
  if (word.find('.') == std::string_view::npos) return false;
  bool is_short = true;
  for_each_part(word, [&](std::string_view part) {
    size_t letters = 0;
    for (size_t at = 0; at < part.size(); at += character_at(part, at).size) ++letters;
    const size_t limit = kind_of(character_at(part, 0).code) == Kind::upper ? 4 : 2;
    is_short = is_short && letters > 0 && letters <= limit && kind_of(character_at(part, 0).code) != Kind::digit;
  });
  return is_short;
}

// 3, 12, 1.2: the number of a list item or a chapter.
bool is_item_number(std::string_view word) {
  bool is_number = true;
  for_each_part(word, [&](std::string_view part) { is_number = is_number && is_digits(part) && part.size() <= 3; });
  return is_number;
}

// Bytes of an article before an apostrophe: l'avv.
size_t elision_size(std::string_view word) {
  size_t size = 0;
  for (size_t at = 0; at < word.size(); at += character_at(word, at).size) {
    if (is_apostrophe(character_at(word, at).code)) size = at + character_at(word, at).size;
  }
  return size;
}

// The context of the full stop.
class Surroundings {
 public:
  Surroundings(std::string_view text, size_t begin) : text_(text), begin_(begin) {}

  bool holds(size_t dot, size_t next, size_t next_word) const {
    const size_t first = word_before(dot);
    const std::string_view word = text_.substr(first, dot - first);
    if (word.empty()) return false;
    const bool is_first = is_first_word(first);
    if (is_first && (is_item_number(word) || is_single_letter(word) || is_roman(word))) return true;
    if (is_digits(word)) return word.size() <= 2 && follows_ordinal(word_at(next_word));
    const bool may_begin = next_word != next || begins_sentences(word_at(next_word));
    if (is_single_letter(word)) return is_initial(first, word) && !may_begin;
    switch (abbreviation_kind(word.substr(elision_size(word)))) {
      case WordKind::title: return true;
      case WordKind::counter: return is_number(next_word);
      case WordKind::company: return !may_begin;
      case WordKind::ordinary: return is_dotted_abbreviation(word) && !may_begin;
    }
    return false;
  }

 private:
  Kind kind_at(size_t at) const { return kind_of(character_at(text_, at).code); }

  // A letter for a name, J. or J.-P.; I is a word unless another full stop precedes it.
  bool is_initial(size_t first, std::string_view word) const {
    const bool follows_dot = first > begin_ + 1 && kind_at(first - 1) == Kind::space && text_[first - 2] == '.';
    return word != "I" || follows_dot;
  }

  // Digits or a Roman numeral at byte `at`, but not the pronoun: no. I am ...
  bool is_number(size_t at) const {
    const bool is_pronoun =
        character_at(text_, at).code == U'I' && kind_at(at + 1) == Kind::space && kind_at(at + 2) == Kind::lower;
    return kind_at(at) == Kind::digit || (is_roman(word_at(at)) && !is_pronoun);
  }

  bool is_first_word(size_t first) const {
    for (size_t at = begin_; at < first;) {
      const Character character = character_at(text_, at);
      const Kind kind = kind_of(character.code);
      if (first - begin_ > kMaxWordBytes || (kind != Kind::opener && kind != Kind::quote)) return false;
      at += character.size;
    }
    return true;
  }

  // First byte of the letters, digits, full stops and apostrophes before byte `end`; `end` if they are too many, or the
  // end of a compound.
  size_t word_before(size_t end) const {
    size_t first = end;
    while (first > begin_) {
      const Character character = character_before(text_, first);
      if (character.code != U'.' && !is_apostrophe(character.code) && !is_letter_of_words(character)) break;
      first -= character.size;
      if (end - first > kMaxWordBytes) return end;
    }
    const bool has_hyphen = first > begin_ + 1 && text_[first - 1] == '-';
    if (has_hyphen && is_letter_of_words(character_before(text_, first - 1))) return end;  // co-ed. is not ed.
    while (first < end && (is_apostrophe(character_at(text_, first).code) || text_[first] == '.')) {
      first += character_at(text_, first).size;
    }
    return first;
  }

  std::string_view word_at(size_t first) const {
    size_t end = first;
    while (end < text_.size() && end - first <= kMaxWordBytes) {
      const Character character = character_at(text_, end);
      if (!is_letter_of_words(character)) break;
      end += character.size;
    }
    // A letter with a full stop is another initial, not a word.
    return text_.substr(first, end < text_.size() && text_[end] == '.' && end - first < 3 ? 0 : end - first);
  }

  std::string_view text_;
  size_t begin_;
};

}  // namespace

bool is_abbreviation(std::string_view text, size_t begin, size_t dot, size_t next, size_t next_word) {
  return Surroundings(text, begin).holds(dot, next, next_word);
}

}  // namespace taco
