// Character kinds that matter for sentence ends, and reading UTF-8 characters.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace taco {

enum class CharacterKind : uint8_t {
  other,  // letters of scripts without case, symbols
  lower,  // letters of scripts in which sentences begin with a capital
  upper,
  digit,
  space,      // White_Space
  paragraph,  // U+2029
  opener,     // opening brackets, and quotes that only open
  closer,     // closing brackets, and quotes that only close
  quote,      // quotes that open in one language and close in another, and marks of emphasis
  dash,       // also bullets
  comma,      // , ; : and the like: no sentence begins with one
  dot,        // the full stop that also abbreviates
  mark,       // ends a sentence before whitespace
  stop,       // ends a sentence also without following whitespace, but not before a digit
  wide,       // the CJK ones: also before a digit
};

// A character and the number of its bytes; both are 0 at the end of the text, and U+FFFD and 1 for a malformed byte.
struct Character {
  char32_t code;
  size_t size;
};

CharacterKind kind_of(char32_t code);

// Letters written without spaces between words: Han and kana.
bool is_cjk_letter(char32_t code);

Character character_at(std::string_view text, size_t at);

// The character that ends at byte `at`.
Character character_before(std::string_view text, size_t at);

// Whether a terminator or a line end may begin with `byte`: false for most bytes of most texts.
bool may_end_sentence(unsigned char byte);

}  // namespace taco
