// The pieces of a vocabulary as a tree of bytes, for the longest piece at the beginning of a text.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace taco {

// Immutable after construction, so threads may share it. About 24 bytes per distinct beginning of a piece.
class PieceTrie {
 public:
  static constexpr int32_t kNone = -1;

  struct Match {
    int32_t id;     // kNone: no piece begins the text
    size_t length;  // bytes
  };

  // The piece at place i has the id i; an empty one stands for no piece. Throws std::invalid_argument for a piece that
  // occurs twice or more pieces than an int32 counts.
  explicit PieceTrie(const std::vector<std::string>& pieces);

  // The longest piece, `prefix` included, that begins `prefix` + `text` and goes beyond `prefix`. `prefix` is given by
  // its node.
  Match longest(uint32_t node, std::string_view text) const;

  static constexpr uint32_t kRoot = 0;
  static constexpr uint32_t kNowhere = UINT32_MAX;

  // The node of `prefix`; kNowhere where no piece begins with it.
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
