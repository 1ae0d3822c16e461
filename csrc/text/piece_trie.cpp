#include "text/piece_trie.hpp"

#include <limits>
#include <stdexcept>

namespace taco {

PieceTrie::PieceTrie(const std::vector<std::string>& pieces) : edges_(1024), ids_(1, kNone) {
  if (pieces.size() > static_cast<size_t>(std::numeric_limits<int32_t>::max())) {
    throw std::invalid_argument("vocabulary: " + std::to_string(pieces.size()) + " pieces do not fit an int32");
  }
  for (size_t id = 0; id < pieces.size(); ++id) {
    if (pieces[id].empty()) continue;
    uint32_t node = kRoot;
    for (const char byte : pieces[id]) node = add_child(node, static_cast<uint8_t>(byte));
    if (ids_[node] != kNone) {
      throw std::invalid_argument("vocabulary: piece " + std::to_string(id) + " is the same as piece " +
                                  std::to_string(ids_[node]));
    }
    ids_[node] = static_cast<int32_t>(id);
  }
}

PieceTrie::Match PieceTrie::longest(uint32_t node, std::string_view text) const {
  Match best{kNone, 0};
  for (size_t i = 0; i < text.size() && node != kNowhere; ++i) {
    node = step(node, static_cast<uint8_t>(text[i]));
    if (node != kNowhere && ids_[node] != kNone) best = {ids_[node], i + 1};
  }
  return best;
}

uint32_t PieceTrie::find(std::string_view prefix) const {
  uint32_t node = kRoot;
  for (const char byte : prefix) {
    if (node != kNowhere) node = step(node, static_cast<uint8_t>(byte));
  }
  return node;
}

// The slot of the edge, or the empty slot where it would be inserted.
size_t PieceTrie::slot_of(uint32_t node, uint8_t byte) const {
  const uint64_t mixed = (uint64_t{node} << 8 | byte) * 0x9E3779B97F4A7C15u;
  const size_t mask = edges_.size() - 1;
  size_t slot = static_cast<size_t>(mixed >> 32) & mask;
  while (edges_[slot].parent != kNowhere && (edges_[slot].parent != node || edges_[slot].byte != byte)) {
    slot = (slot + 1) & mask;
  }
  return slot;
}

uint32_t PieceTrie::step(uint32_t node, uint8_t byte) const {
  const Edge& edge = edges_[slot_of(node, byte)];
  return edge.parent == kNowhere ? kNowhere : edge.child;
}

uint32_t PieceTrie::add_child(uint32_t node, uint8_t byte) {
  if (2 * (ids_.size() + 1) > edges_.size()) grow();
  Edge& edge = edges_[slot_of(node, byte)];
  if (edge.parent == kNowhere) {
    if (ids_.size() >= kNowhere) throw std::invalid_argument("vocabulary: too long for 32-bit nodes");
    edge = {node, static_cast<uint32_t>(ids_.size()), byte};
    ids_.push_back(kNone);
  }
  return edge.child;
}

void PieceTrie::grow() {
  std::vector<Edge> old(edges_.size() * 2);
  old.swap(edges_);
  for (const Edge& edge : old) {
    if (edge.parent != kNowhere) edges_[slot_of(edge.parent, edge.byte)] = edge;
  }
}

}  // namespace taco
