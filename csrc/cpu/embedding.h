// Sums of the rows of a table that indices name, in every member of a population.
#pragma once

#include <cstdint>

namespace depthnet {

// y[b] = sum over a < active of table[index[b][a]], added in this order, and the gradient of the table.
// Tensors are contiguous but for the members of the index, which lie index_member elements apart.
struct Embedding {
  int64_t members, rows, active, features, n;
  const int64_t* index;  // (members, rows, active)
  int64_t index_member;
};

// Whether all indices name features; where not, y is not whole.  T is float or double.
template <class T>
bool embedding_forward(const Embedding& e, const T* table, T* y, int threads);

// Every row of the gradient is made by one thread.
template <class T>
void embedding_backward(const Embedding& e, const T* grad, T* table_grad, int threads);

}  // namespace depthnet
