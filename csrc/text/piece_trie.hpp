// The pieces of a vocabulary as a trie of bytes, to find the longest piece at the beginning of a text.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace taco {

// Immutable after construction, so threads may share it. About 24 bytes per distinct prefix of a piece.
class PieceTrie {
 public:
  static constexpr int32_t kNone = -1;

  struct Match {
    int32_t id;     // kNone: no piece begins the text
    size_t length;  // bytes
  };

  // pieces[i] has the id i; an empty string stands for no piece. Throws std::invalid_argument if a piece occurs twice
  // or there are more pieces than an int32 can count.
  explicit PieceTrie(const std::vector<std::string>& pieces);

  // The longest piece, `prefix` included, that begins `prefix` + `text` and is longer than `prefix`, given by its node.
  Match longest(uint32_t node, std::string_view text) const;

  static constexpr uint32_t kRoot = 0;
  static constexpr uint32_t kNowhere = UINT32_MAX;

  // The node of `prefix`; kNowhere if no piece begins with it.
  uint32_t find(std::string_view prefix) const;

 private:
  struct Edge {
    uint32_t parent = kNowhere;
    uint32_t child = 0;
    uint8_t byte = 0;
  };

  size_t slot_of(uint32_t node, uint8_t byte) const;
  uint32_t step(uint32_t node, uint8_t byte) const;
  uint32_t add_child(uint32_t node, uint8_t byte);
  void grow();

  std::vector<Edge> edges_;   // open addressing, a power of two, at most half full
  std::vector<int32_t> ids_;  // by node
};

}  // namespace taco
