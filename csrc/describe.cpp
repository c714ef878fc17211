#include "describe.h"

#include <cstdint>

namespace py = pybind11;

namespace depthnet {
namespace {

// The stable structures of DLPack 1.x (https://dmlc.github.io/dlpack), as far as they are used.
struct DLTensor {
  void* data;
  struct { int32_t type, id; } device;
  int32_t ndim;
  struct { uint8_t code, bits; uint16_t lanes; } dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct ExchangeApi {
  struct { uint32_t major, minor; } version;
  ExchangeApi* previous;
  void *allocate, *managed_from_object, *managed_to_object;
  int (*tensor_from_object)(void* object, DLTensor* out);  // borrows; -1 and a Python error on failure
  void* current_stream;
};

const ExchangeApi* api = nullptr;

uint64_t mixed(uint64_t hash, uint64_t value) {
  hash = (hash ^ value) * 0x9e3779b97f4a7c15u;
  return hash ^ (hash >> 29);
}

int64_t fingerprint(const DLTensor& t) {
  uint64_t hash = mixed(uint64_t(t.device.type), uint64_t(t.device.id));
  hash = mixed(hash, uint64_t(t.dtype.code) << 32 | uint64_t(t.dtype.bits) << 16 | t.dtype.lanes);
  hash = mixed(hash, uint64_t(t.ndim));
  for (int32_t d = 0; d < t.ndim; ++d) {
    hash = mixed(hash, uint64_t(t.shape[d]));
    hash = mixed(hash, uint64_t(t.strides[d]));
  }
  return int64_t(hash | 1);
}

// One column of the table.
struct Described {
  int64_t *address, *form;

  void operator()(PyObject* tensor, bool may_be_negated) {
    DLTensor t;
    if (tensor == Py_None || api->tensor_from_object(tensor, &t)) {
      PyErr_Clear();
      *address++ = *form++ = 0;
      return;
    }
    int64_t size = 1;
    for (int32_t d = 0; d < t.ndim; ++d) size *= t.shape[d];
    if (!t.data && size) {
      *address++ = *form++ = 0;
      return;
    }
    *address++ = int64_t(reinterpret_cast<uintptr_t>(t.data)) + int64_t(t.byte_offset);
    *form = fingerprint(t);
    if (may_be_negated) {
      static PyObject* const name = PyUnicode_InternFromString("is_neg");
      const auto negated = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor, name));
      if (!negated) throw py::error_already_set();
      if (negated.ptr() == Py_True) *form ^= 2;
    }
    ++form;
  }
};

Described table(uintptr_t out, Py_ssize_t count) {
  int64_t* const addresses = reinterpret_cast<int64_t*>(out);
  return {addresses, addresses + count};
}

}  // namespace

bool use_exchange_api(py::capsule capsule) {
  const auto* offered = static_cast<const ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (!offered) throw py::error_already_set();
  if (offered->version.major != 1 || !offered->tensor_from_object) return false;
  api = offered;
  return true;
}

void describe(py::list tensors, uintptr_t out) {
  const Py_ssize_t count = PyList_GET_SIZE(tensors.ptr());
  Described describe = table(out, count);
  for (Py_ssize_t i = 0; i < count; ++i) describe(PyList_GET_ITEM(tensors.ptr(), i), true);
}

bool describe_step(py::list params, py::list sources, uintptr_t out) {
  const Py_ssize_t count = PyList_GET_SIZE(params.ptr()), states = PyList_GET_SIZE(sources.ptr());
  Described describe = table(out, 2 * count + states);
  for (Py_ssize_t i = 0; i < count; ++i) describe(PyList_GET_ITEM(params.ptr(), i), false);
  const py::str name("grad");
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* const grad = PyObject_GetAttr(PyList_GET_ITEM(params.ptr(), i), name.ptr());
    if (!grad) throw py::error_already_set();
    describe(grad, true);
    Py_DECREF(grad);
  }
  for (Py_ssize_t i = 0; i < states; ++i) {
    PyObject* const source = PyList_GET_ITEM(sources.ptr(), i);
    PyObject* const state = PyDict_GetItemWithError(PyTuple_GET_ITEM(source, 0), PyTuple_GET_ITEM(source, 1));
    if (!state) {
      if (PyErr_Occurred()) throw py::error_already_set();
      return false;
    }
    describe(state, false);
  }
  return true;
}

}  // namespace depthnet
