// Hashes of documents, which decide their splits.
#include "arrays.hpp"
#include "taco/document_hashes.hpp"

namespace taco::python {
namespace {

template <typename Token>
Array<uint64_t> hash_documents(const Array<Token>& tokens, const Array<int64_t>& offsets, int num_threads) {
  check_vector(tokens, "tokens");
  check_vector(offsets, "offsets");
  if (offsets.size() < 1) throw std::invalid_argument("offsets must have at least one entry");
  const int64_t num_tokens = tokens.size(), num_documents = offsets.size() - 1;
  Array<uint64_t> hashes(num_documents);
  const Token* const token_data = tokens.data();
  const int64_t* const offset_data = offsets.data();
  uint64_t* const hash_data = hashes.mutable_data();
  py::gil_scoped_release release;
  taco::hash_documents(token_data, num_tokens, offset_data, num_documents, num_threads, hash_data);
  return hashes;
}

template <typename... Tokens>
void bind_hashes(py::module_& module) {
  (module.def("hash_documents", &hash_documents<Tokens>, "tokens"_a.noconvert(), "offsets"_a.noconvert(),
              "num_threads"_a),
   ...);
}

}  // namespace

void bind_splits(py::module_& module) { bind_hashes<uint16_t, int32_t, uint8_t, int8_t, int16_t, int64_t>(module); }

}  // namespace taco::python
