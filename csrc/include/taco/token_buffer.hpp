// A growing array of token ids that is not zero-initialised and can be passed on without a copy.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>
#include <utility>

namespace taco {

template <typename Id>
class TokenBuffer {
 public:
  TokenBuffer() = default;
  TokenBuffer(const TokenBuffer&) = delete;
  TokenBuffer& operator=(const TokenBuffer&) = delete;
  ~TokenBuffer() { std::free(data_); }

  size_t size() const { return size_; }
  Id* end() { return data_ + size_; }

  // Makes room for `count` ids at end(). Throws std::bad_alloc.
  void reserve(size_t count) {
    if (capacity_ - size_ < count) resize_memory(size_ + count + size_ / 2 + 1024);
  }

  // Keeps `count` ids that were written at end().
  void advance(size_t count) { size_ += count; }

  // Shrinks the memory to size and transfers its ownership to the caller, who must std::free it.
  Id* release() {
    resize_memory(size_ == 0 ? 1 : size_);
    size_ = capacity_ = 0;
    return std::exchange(data_, nullptr);
  }

 private:
  void resize_memory(size_t capacity) {
    void* const moved = std::realloc(data_, capacity * sizeof(Id));
    if (moved == nullptr) throw std::bad_alloc();
    data_ = static_cast<Id*>(moved);
    capacity_ = capacity;
  }

  Id* data_ = nullptr;
  size_t size_ = 0, capacity_ = 0;
};

}  // namespace taco
