// Full stops that belong to a word and do not end a sentence: abbreviations, initials, ordinals, item numbers.
#pragma once

#include <cstddef>
#include <string_view>

namespace taco {

// Whether the full stop at byte `dot` of `text` belongs to the word before it. The sentence begins at byte `begin`; the
// next one would begin at `next`, after whitespace, and its first word, after quotes and dashes, at `next_word`.
bool is_abbreviation(std::string_view text, size_t begin, size_t dot, size_t next, size_t next_word);

}  // namespace taco
