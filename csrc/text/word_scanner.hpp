// Reads texts for WordPiece, one at a time: finds the words and looks up their ids. Private to wordpiece.cpp.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <stdexcept>
#include <string_view>
#include <vector>

#include "taco/wordpiece.hpp"
#include "text/ascii_word.hpp"
#include "text/word_cache.hpp"

namespace taco {

// Not thread-safe. Between texts it keeps only the cache of recent words.
template <typename Id>
class WordScanner {
 public:
  explicit WordScanner(const WordPiece<Id>& owner)
      : owner_(owner),
        characters_(owner.characters_),
        fold_(owner.is_cased_ ? 0 : 0x20),
        word_(4 * owner.max_word_characters_ + kSlack),
        short_words_(16),
        long_words_(14) {}

  // Appends the ids of `text`.
  void scan(std::string_view text, TokenBuffer<Id>& ids) {
    const char* p = text.data();
    const char* const end = p + text.size();
    ids_ = &ids;
    clear_word();
    while (p < end) {
      p = read_plain_words(p, end);
      while (p < end) {
        p = read_character(p, end);
        if (num_characters_ == 0 && p < end && static_cast<uint8_t>(*p) < 0x80) break;
      }
    }
    end_word();
  }

 private:
  using ShortWords = WordCache<2, 7, Id>;
  using LongWords = WordCache<4, 15, Id>;
  static constexpr size_t kSlack = 16;

  // Reads words of fewer than 16 ASCII letters and digits with the space or punctuation that ends them; stops before
  // anything else.
  const char* read_plain_words(const char* p, const char* end) {
    while (end - p >= kAsciiBlock) {
      const AsciiWord word = read_ascii_word(p, fold_);
      const auto next = static_cast<uint8_t>(p[word.length]);
      if (word.length == kAsciiBlock || next >= 0x80) break;
      const uint16_t kind = characters_.kind(next);
      if (kind != kSpace && (kind != kIsolated || next == '[')) break;
      if (word.length > 0) add_short({word.key[0], word.key[1]}, static_cast<size_t>(word.length));
      if (kind == kIsolated) add_id(owner_.isolated_ids_[next]);
      p += word.length + 1;
    }
    return p;
  }

  // Reads one character, or a special token.
  const char* read_character(const char* p, const char* end) {
    if (*p == '[') {
      const std::string_view rest(p, static_cast<size_t>(end - p));
      if (const SpecialToken* token = owner_.find_special(rest)) {
        end_word();
        add_id(static_cast<Id>(token->id));
        return p + token->text.size();
      }
    }
    int size = 1;
    const uint32_t c = decode(p, end, size);
    const uint16_t kind = characters_.kind(c);
    if (kind >= kReplaced) {
      const Replacement& replacement = characters_.replacement(kind);
      for (int i = 0; i < replacement.count; ++i) {
        const uint32_t code_point = replacement.code_points[static_cast<size_t>(i)];
        const Utf8 utf8 = to_utf8(code_point);
        take(code_point, characters_.kind(code_point), utf8.bytes.data(), static_cast<size_t>(utf8.size));
      }
    } else {
      take(c, kind, p, static_cast<size_t>(size));
    }
    return p + size;
  }

  static uint32_t decode(const char* p, const char* end, int& size) {
    const auto byte = [p](int i) { return static_cast<uint32_t>(static_cast<uint8_t>(p[i])); };
    const uint32_t first = byte(0);
    if (first < 0x80) return first;
    size = first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4;
    if (end - p < size) throw std::invalid_argument("text: ends within a character; expected UTF-8");
    if (size == 2) return (first & 0x1F) << 6 | (byte(1) & 0x3F);
    if (size == 3) return (first & 0x0F) << 12 | (byte(1) & 0x3F) << 6 | (byte(2) & 0x3F);
    const uint32_t c = (first & 0x07) << 18 | (byte(1) & 0x3F) << 12 | (byte(2) & 0x3F) << 6 | (byte(3) & 0x3F);
    if (c > kMaxCodePoint) throw std::invalid_argument("text: a code point beyond U+10FFFF; expected UTF-8");
    return c;
  }

  void take(uint32_t c, uint16_t kind, const char* bytes, size_t size) {
    switch (kind) {
      case kOrdinary:
        append(bytes, size);
        first_mark_ = num_bytes_;
        break;
      case kSpace: end_word(); break;
      case kIsolated:
        end_word();
        add_isolated(c, bytes, size);
        break;
      case kMark: insert_mark(characters_.combining_class(c), bytes, size); break;
      case kBarrier: first_mark_ = num_bytes_; break;
      default:  // removed
        break;
    }
  }

  // Beyond the longest allowed word characters are only counted, so that an endless word takes no memory.
  void append(const char* bytes, size_t size) {
    if (num_characters_ < owner_.max_word_characters_) {
      std::memcpy(word_.data() + num_bytes_, bytes, size);
      num_bytes_ += size;
    }
    ++num_characters_;
  }

  // Appends a mark and moves it before marks of a higher class.
  void insert_mark(int combining_class, const char* bytes, size_t size) {
    const size_t old_end = num_bytes_;
    append(bytes, size);
    if (num_bytes_ == old_end) return;
    size_t place = old_end;
    while (place > first_mark_) {
      size_t before = place - 1;
      while ((static_cast<uint8_t>(word_[before]) & 0xC0) == 0x80) --before;
      int length = 0;
      const uint32_t mark = decode(&word_[before], &word_[place], length);
      if (characters_.combining_class(mark) <= combining_class) break;
      place = before;
    }
    const auto at = [this](size_t offset) { return word_.begin() + static_cast<std::ptrdiff_t>(offset); };
    std::rotate(at(place), at(old_end), at(num_bytes_));
  }

  void clear_word() { num_bytes_ = num_characters_ = first_mark_ = 0; }

  void end_word() {
    if (num_characters_ == 0) return;
    if (num_characters_ > owner_.max_word_characters_) {
      add_id(owner_.unknown_id_);
    } else {
      add_word(word_.data(), num_bytes_);
    }
    clear_word();
  }

  void add_word(const char* bytes, size_t size) {
    if (size <= ShortWords::kKeyBytes) {
      add_short(ShortWords::make_key(bytes, size), size);
    } else if (size <= LongWords::kKeyBytes) {
      add_known(long_words_, LongWords::make_key(bytes, size), size);
    } else {
      add_new(bytes, size);
    }
  }

  void add_short(const typename ShortWords::Key& key, size_t size) { add_known(short_words_, key, size); }

  template <typename Cache>
  void add_known(Cache& cache, const typename Cache::Key& key, size_t size) {
    const typename Cache::Slot& slot = cache.slot(key);
    if (slot.key == key) {
      ids_->reserve(slot.ids.size());
      // Copies all of them, so that the number of bytes is constant; the next word overwrites the surplus.
      std::memcpy(ids_->end(), slot.ids.data(), sizeof(slot.ids));
      ids_->advance(static_cast<size_t>(slot.count));
      return;
    }
    char bytes[Cache::kKeyBytes];
    std::memcpy(bytes, key.data(), sizeof(bytes));
    const size_t count = add_new(bytes, size);
    cache.store(key, ids_->end() - count, count);
  }

  size_t add_new(const char* bytes, size_t size) {
    ids_->reserve(owner_.max_word_characters_ + 1);
    const size_t count = owner_.split_word(bytes, size, ids_->end());
    ids_->advance(count);
    return count;
  }

  void add_isolated(uint32_t c, const char* bytes, size_t size) {
    if (c < owner_.isolated_ids_.size()) {
      add_id(owner_.isolated_ids_[c]);
    } else {
      append(bytes, size);
      end_word();
    }
  }

  void add_id(Id id) {
    ids_->reserve(1);
    *ids_->end() = id;
    ids_->advance(1);
  }

  const WordPiece<Id>& owner_;
  const CharTable& characters_;
  const char fold_;
  TokenBuffer<Id>* ids_ = nullptr;
  std::vector<char> word_;  // the word so far: num_bytes_ of it
  size_t num_bytes_ = 0;
  size_t first_mark_ = 0;      // where its trailing marks begin
  size_t num_characters_ = 0;  // also counted beyond the longest allowed word
  ShortWords short_words_;
  LongWords long_words_;
};

}  // namespace taco
