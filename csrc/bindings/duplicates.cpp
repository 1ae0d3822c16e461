// Duplicate documents.
#include "arrays.hpp"
#include "taco/duplicates.hpp"

namespace taco::python {
namespace {

static_assert(sizeof(taco::DocumentHash) == 2 * sizeof(uint64_t));

taco::DocumentHash hash_bytes(const py::bytes& data) {
  const std::string_view view = data;
  return taco::hash_document(reinterpret_cast<const uint8_t*>(view.data()), view.size());
}

void hash_documents(const Array<uint8_t>& file, const Array<int64_t>& offsets, int num_threads,
                    Array<uint64_t>& out_hashes) {
  check_vector(file, "file");
  check_vector(offsets, "offsets");
  const int64_t num_bytes = file.size(), num_documents = offsets.size() - 1;
  check_shape(out_hashes, "out_hashes", {num_documents, 2});
  const uint8_t* const data = file.data();
  const int64_t* const offset_data = offsets.data();
  auto* const hash_data = reinterpret_cast<taco::DocumentHash*>(out_hashes.mutable_data());
  py::gil_scoped_release release;
  taco::hash_documents(data, num_bytes, offset_data, num_documents, num_threads, hash_data);
}

void mark_duplicates(const Array<uint8_t>& file, const Array<int64_t>& offsets, const Array<uint64_t>& hashes,
                     int64_t part, int64_t num_parts, int num_threads, Array<uint8_t>& out_is_duplicate) {
  check_vector(file, "file");
  check_vector(offsets, "offsets");
  const int64_t num_bytes = file.size(), num_documents = offsets.size() - 1;
  check_shape(hashes, "hashes", {num_documents, 2});
  check_shape(out_is_duplicate, "out_is_duplicate", {num_documents});
  const uint8_t* const data = file.data();
  const int64_t* const offset_data = offsets.data();
  const auto* const hash_data = reinterpret_cast<const taco::DocumentHash*>(hashes.data());
  uint8_t* const duplicate_data = out_is_duplicate.mutable_data();
  py::gil_scoped_release release;
  taco::mark_duplicates(data, num_bytes, offset_data, num_documents, hash_data, part, num_parts, num_threads,
                        duplicate_data);
}

}  // namespace

void bind_duplicates(py::module_& module) {
  module.def(
      "hash_document",
      [](const py::bytes& data) {
        const taco::DocumentHash hash = hash_bytes(data);
        return py::make_tuple(hash.high, hash.low);
      },
      "data"_a);
  module.def("hash_documents", &hash_documents, "file"_a.noconvert(), "offsets"_a.noconvert(), "num_threads"_a,
             "out_hashes"_a.noconvert());
  module.def("mark_duplicates", &mark_duplicates, "file"_a.noconvert(), "offsets"_a.noconvert(), "hashes"_a.noconvert(),
             "part"_a, "num_parts"_a, "num_threads"_a, "out_is_duplicate"_a.noconvert());
}

}  // namespace taco::python
