// What the tables of an optimizer step need to know of thousands of tensors at every step, without a Python
// call for each.
#pragma once

#include <pybind11/pybind11.h>

namespace depthnet {

// Take the functions of torch.Tensor.__dlpack_c_exchange_api__; false if they are not of a known version.
bool use_exchange_api(pybind11::capsule api);

// Writes, for N tensors, N addresses and then N fingerprints of dtype, device, shape, strides and whether
// the tensor is a negated view: equal for tensors that are laid out alike.  Both are 0 for None and for what has no memory of its own (sparse, wrapped, fake).
void describe(pybind11::list tensors, uintptr_t out);

// The same for parameters, their gradients, and the states (no negated views) that `sources`, tuples (dict, key), name; false
// if a key is missing.
bool describe_step(pybind11::list params, pybind11::list sources, uintptr_t out);

}  // namespace depthnet
