#include "taco/sentences.hpp"

#include <algorithm>
#include <array>
#include <utility>

#include "sentences/sentence_abbreviations.hpp"
#include "sentences/sentence_characters.hpp"

namespace taco {
namespace {

using Kind = CharacterKind;

constexpr int kMaxOpeners = 8;  // examined between a terminator and the next word
constexpr size_t kMaxFootnoteDigits = 4;
constexpr size_t kMaxBracketBytes = 128;  // searched before ?) for the opening bracket

// Whitespace between two byte offsets, and whether a paragraph ends in it.
struct Gap {
  size_t end;
  bool is_paragraph;
};

// Terminators with the quotes and brackets that close after them.
struct Stop {
  size_t end;
  Kind kind;           // the strongest of the terminators
  bool is_single_dot;  // which may belong to an abbreviation
  bool has_closer;
};

bool is_terminator(Kind kind) {
  return kind == Kind::dot || kind == Kind::mark || kind == Kind::stop || kind == Kind::wide;
}

bool is_greek(char32_t code) { return (code >= 0x370 && code <= 0x3FF) || (code >= 0x1F00 && code <= 0x1FFF); }

// Quotes that only open if they directly follow a terminator that needs no space.
bool opens_next(char32_t code) { return code == U'“' || code == U'‘' || code == U'«' || code == U'‹'; }

// Words after a closed quote that continue the sentence around it: 「…。」と言った.
bool goes_on_after_quote(char32_t code) {
  constexpr std::array<char32_t, 8> particles = {U'と', U'っ', U'な', U'の', U'を', U'に', U'も', U'で'};
  for (const char32_t particle : particles) {
    if (code == particle) return true;
  }
  return false;
}

class Splitter {
 public:
  explicit Splitter(std::string_view text) : text_(text) {}

  std::vector<Sentence> run() {
    begin_ = gap_at(0).end;
    size_t at = begin_;
    while ((at = next_candidate(at)) < text_.size()) {
      const Character character = character_at(text_, at);
      const Kind kind = stop_kind(at);
      if (kind == Kind::space || kind == Kind::paragraph) {
        const Gap gap = gap_at(at);
        if (gap.is_paragraph) cut(at, gap.end);
        at = gap.end;
      } else if (is_terminator(kind)) {
        at = pass_stop(at);
      } else {
        at += character.size;
      }
    }
    cut(text_.size(), text_.size());
    return std::move(sentences_);
  }

 private:
  Kind kind_at(size_t at) const { return kind_of(character_at(text_, at).code); }

  // The kind of the character at byte `at`; in Greek, the semicolon is the question mark.
  Kind stop_kind(size_t at) const {
    if (text_[at] != ';') return kind_at(at);
    return at > begin_ && is_greek(character_before(text_, at).code) ? Kind::mark : Kind::comma;
  }

  size_t next_candidate(size_t at) const {
    while (at < text_.size() && !may_end_sentence(static_cast<unsigned char>(text_[at]))) ++at;
    return at;
  }

  // Ends the sentence at byte `end`, without trailing whitespace.
  void cut(size_t end, size_t next) {
    while (end > begin_) {
      const Character last = character_before(text_, end);
      const Kind kind = kind_of(last.code);
      if (kind != Kind::space && kind != Kind::paragraph) break;
      end -= last.size;
    }
    if (end > begin_) sentences_.push_back({begin_, end});
    begin_ = next;
  }

  // Two line ends make a paragraph; carriage return and line feed together are one.
  Gap gap_at(size_t at) const {
    int line_ends = 0;
    bool is_paragraph = false, after_return = false;
    while (at < text_.size()) {
      const Character character = character_at(text_, at);
      const Kind kind = kind_of(character.code);
      if (kind != Kind::space && kind != Kind::paragraph) break;
      const bool is_end = character.code == U'\r' || (character.code == U'\n' && !after_return);
      after_return = character.code == U'\r';
      line_ends = is_end && line_ends < 2 ? line_ends + 1 : line_ends;
      is_paragraph = is_paragraph || kind == Kind::paragraph || line_ends == 2;
      at += character.size;
    }
    return {at, is_paragraph};
  }

  // Handles the terminator at byte `at`; returns where to continue.
  size_t pass_stop(size_t at) {
    const Stop stop = stop_at(at);
    const Gap gap = gap_at(stop.end);
    const bool is_cut = gap.is_paragraph ||
                        (gap.end < text_.size() && !is_bracketed(at) &&
                         (gap.end == stop.end ? ends_without_space(at, stop) : ends_before_space(at, stop, gap.end)));
    if (is_cut) cut(stop.end, gap.end);
    return gap.end;
  }

  // (?), [...] and (really?) are part of a sentence that begins before the bracket.
  bool is_bracketed(size_t at) const {
    if (at > begin_ && kind_of(character_before(text_, at).code) == Kind::opener) return true;
    if ((text_[at] != '?' && text_[at] != '!') || at + 1 == text_.size() || text_[at + 1] != ')') return false;
    const size_t first = std::max(begin_, at - std::min(at, kMaxBracketBytes));
    const size_t bracket = text_.substr(first, at - first).rfind('(');
    return bracket != std::string_view::npos && first + bracket > begin_;
  }

  Stop stop_at(size_t at) const {
    Stop stop{at + character_at(text_, at).size, stop_kind(at), false, false};
    bool is_alone = at == begin_ || text_[at - 1] != '.';
    while (stop.end < text_.size()) {
      const Kind kind = kind_at(stop.end);
      if (is_terminator(kind)) {
        stop.kind = std::max(stop.kind, kind);
        stop.end += character_at(text_, stop.end).size;
        is_alone = false;
      } else if (const size_t size = closer_at(stop.end, stop.kind); size > 0) {
        stop.end += size;
        stop.has_closer = true;
      } else {
        break;
      }
    }
    stop.is_single_dot = is_alone && text_[at] == '.';
    return stop;
  }

  // Bytes of a closing quote or bracket at byte `at` after terminators of kind `stop`, or 0.
  size_t closer_at(size_t at, Kind stop) const {
    const Character character = character_at(text_, at);
    const Kind kind = kind_of(character.code);
    if (kind == Kind::closer) return character.size;
    if (kind == Kind::quote) return stop >= Kind::stop && opens_next(character.code) ? 0 : character.size;
    if (kind == Kind::space) return spaced_quote_at(at, character.size);
    return stop >= Kind::stop ? 0 : footnote_at(at);
  }

  // French has a space before its closing quotes: « Pourquoi ? » Il ...
  size_t spaced_quote_at(size_t at, size_t blank_bytes) const {
    const Character quote = character_at(text_, at + blank_bytes);
    const size_t end = at + blank_bytes + quote.size;
    const bool closes = quote.code == U'»' || quote.code == U'›';
    return closes && (end == text_.size() || gap_at(end).end > end) ? end - at : 0;
  }

  // Bytes of a footnote mark like [12] at byte `at`, or 0.
  size_t footnote_at(size_t at) const {
    if (text_[at] != '[') return 0;
    size_t end = at + 1;
    while (end < text_.size() && end - at <= kMaxFootnoteDigits && text_[end] >= '0' && text_[end] <= '9') ++end;
    return end > at + 1 && end < text_.size() && text_[end] == ']' ? end + 1 - at : 0;
  }

  bool ends_without_space(size_t at, const Stop& stop) const {
    const Character next = character_at(text_, stop.end);
    const Kind kind = kind_of(next.code);
    if (kind == Kind::comma || kind == Kind::closer) return false;
    if (stop.kind == Kind::wide) return !(stop.has_closer && goes_on_after_quote(next.code));
    if (stop.kind == Kind::stop) return kind != Kind::digit;
    const bool is_ascii_mark = text_[at] == '!' || text_[at] == '?';
    return is_ascii_mark && !stop.has_closer && is_cjk_letter(next.code) && at > begin_ &&
           is_cjk_letter(character_before(text_, at).code);
  }

  bool ends_before_space(size_t at, const Stop& stop, size_t next) const {
    const Kind first = kind_at(next);
    if (first == Kind::comma || first == Kind::closer || is_terminator(first)) return false;
    if (stop.kind >= Kind::stop) return !(stop.has_closer && goes_on_after_quote(character_at(text_, next).code));
    const size_t word = skip_openers(next);
    if (kind_at(word) == Kind::lower) return false;
    return !stop.is_single_dot || !is_abbreviation(text_, begin_, at, next, word);
  }

  // Quotes, brackets and dashes before a word; whitespace may follow a dash, but not the end of a paragraph.
  size_t skip_openers(size_t at) const {
    for (int i = 0; i < kMaxOpeners; ++i) {
      const Character character = character_at(text_, at);
      const Kind kind = kind_of(character.code);
      if (kind != Kind::opener && kind != Kind::quote && kind != Kind::dash) return at;
      const size_t end = at + character.size;
      const Gap gap = gap_at(end);
      at = kind == Kind::dash && !gap.is_paragraph ? gap.end : end;
    }
    return at;
  }

  std::string_view text_;
  size_t begin_ = 0;
  std::vector<Sentence> sentences_;
};

}  // namespace

std::vector<Sentence> split_sentences(std::string_view text) { return Splitter(text).run(); }

}  // namespace taco
