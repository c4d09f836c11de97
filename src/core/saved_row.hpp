// A row's state on its way to and from the tensors of a StateView.
#pragma once

#include "core/half.hpp"
#include "keyfold/state.hpp"

namespace keyfold::core {

/// A query row of one head.
struct RowIndex {
  std::int64_t batch, head, row;
};

inline void save_row(const StateView& to, const RowIndex& i, float m, float l, const float* o) {
  store_float(element(to.m, i.batch, i.head, i.row, 0), DType::kFloat32, m);
  store_float(element(to.l, i.batch, i.head, i.row, 0), DType::kFloat32, l);
  for (std::int64_t d = 0; d < to.o.sizes[3]; ++d) {
    store_float(element(to.o, i.batch, i.head, i.row, d), DType::kFloat32, o[d]);
  }
}

inline void load_row(const StateView& from, const RowIndex& i, float& m, float& l, float* o) {
  m = load_float(element(from.m, i.batch, i.head, i.row, 0), DType::kFloat32);
  l = load_float(element(from.l, i.batch, i.head, i.row, 0), DType::kFloat32);
  for (std::int64_t d = 0; d < from.o.sizes[3]; ++d) {
    o[d] = load_float(element(from.o, i.batch, i.head, i.row, d), DType::kFloat32);
  }
}

}  // namespace keyfold::core
