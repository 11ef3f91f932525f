// SPDX-License-Identifier: Apache-2.0
// The extension module: a function for every op of csrc/ops.cpp. Tensors are read through DLPack's exchange API, a table of C
// functions that torch.Tensor has from 2.11 on; it and the limited API of Python are all that a call needs of either.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "native_op.h"

#undef TORCH_TARGET_VERSION  // which keeps torch's copy of the standard's header out
#include <ATen/dlpack.h>

#include <algorithm>
#include <deque>
#include <exception>
#include <string>

namespace mpk {

extern const char* const kSchemas[];

namespace {

#ifdef MPK_EMULATOR
constexpr bool kEmulated = true;  // the GPU's memory is the CPU's
#else
constexpr bool kEmulated = false;
#endif

const DLPackExchangeAPI* exchange = nullptr;

struct Dtype {
  const char* name;
  ScalarType type;
  uint8_t code, bits;  // DLPack's
  PyObject* object;    // torch's
};
Dtype dtypes[] = {
    {"float32", ScalarType::Float, kDLFloat, 32, nullptr},
    {"float16", ScalarType::Half, kDLFloat, 16, nullptr},
    {"bfloat16", ScalarType::BFloat16, kDLBfloat, 16, nullptr},
    {"float64", ScalarType::Double, kDLFloat, 64, nullptr},
    {"int64", ScalarType::Long, kDLInt, 64, nullptr},
    {"int32", ScalarType::Int, kDLInt, 32, nullptr},
    {"uint8", ScalarType::Byte, kDLUInt, 8, nullptr},
    {"float8_e4m3fn", ScalarType::Float8_e4m3fn, kDLFloat8_e4m3fn, 8, nullptr},
    {"float8_e5m2", ScalarType::Float8_e5m2, kDLFloat8_e5m2, 8, nullptr},
};

[[noreturn]] void raise(PyObject* type, const std::string& message) {
  PyErr_SetString(type, message.c_str());
  throw PythonError();
}

PyObject* object_of(PythonObject* object) { return reinterpret_cast<PyObject*>(object); }
PythonObject* handle_of(PyObject* object) { return reinterpret_cast<PythonObject*>(object); }

template <class T>
T checked(T value) {
  if (value == static_cast<T>(-1) && PyErr_Occurred() != nullptr) throw PythonError();
  return value;
}

ScalarType type_of(const DLDataType& dtype) {
  for (const Dtype& known : dtypes) {
    if (known.code == dtype.code && known.bits == dtype.bits && dtype.lanes == 1) return known.type;
  }
  raise(PyExc_RuntimeError, "a tensor has a dtype that no kernel reads");
}

}  // namespace

// ----- arguments and results -----

Tensor Arguments::to(std::in_place_type_t<Tensor>, PythonObject* object) {
  DLTensor t;
  if (exchange->dltensor_from_py_object_no_sync(object, &t) != 0) throw PythonError();
  const bool is_cuda = t.device.device_type == kDLCUDA;
  if (!is_cuda && t.device.device_type != kDLCPU && t.device.device_type != kDLCUDAHost) {
    raise(PyExc_RuntimeError, "a tensor is on a device that no kernel reads");
  }
  is_cuda_ |= is_cuda;
  const Tensor tensor(static_cast<char*>(t.data) + t.byte_offset, t.ndim, t.shape, t.strides, type_of(t.dtype), is_cuda,
                      t.device.device_id);
  // A wrapper's, a fake tensor's, or one's whose storage was freed.
  if (t.data == nullptr && tensor.numel() != 0) raise(PyExc_RuntimeError, "a tensor has no memory");
  return tensor;
}

std::optional<Tensor> Arguments::to(std::in_place_type_t<std::optional<Tensor>>, PythonObject* object) {
  if (object_of(object) == Py_None) return std::nullopt;
  return to(std::in_place_type<Tensor>, object);
}

ScalarType Arguments::to(std::in_place_type_t<ScalarType>, PythonObject* object) {
  for (const Dtype& known : dtypes) {
    if (known.object == object_of(object)) return known.type;
  }
  raise(PyExc_TypeError, "expected a dtype that kernels know");
}

int64_t Arguments::to(std::in_place_type_t<int64_t>, PythonObject* object) {
  return checked(PyLong_AsLongLong(object_of(object)));
}

bool Arguments::to(std::in_place_type_t<bool>, PythonObject* object) { return checked(PyObject_IsTrue(object_of(object))); }

double Arguments::to(std::in_place_type_t<double>, PythonObject* object) {
  return checked(PyFloat_AsDouble(object_of(object)));
}

std::optional<double> Arguments::to(std::in_place_type_t<std::optional<double>>, PythonObject* object) {
  if (object_of(object) == Py_None) return std::nullopt;
  return to(std::in_place_type<double>, object);
}

PythonObject* to_python(bool value) { return handle_of(PyBool_FromLong(value)); }
PythonObject* to_python(int64_t value) { return handle_of(PyLong_FromLongLong(value)); }
PythonObject* to_python(const std::tuple<int64_t, int64_t>& value) {
  return handle_of(
      Py_BuildValue("(LL)", static_cast<long long>(std::get<0>(value)), static_cast<long long>(std::get<1>(value))));
}
PythonObject* none() {
  Py_INCREF(Py_None);
  return handle_of(Py_None);
}

WithoutGil::WithoutGil() : state_(PyEval_SaveThread()) {}
WithoutGil::~WithoutGil() { PyEval_RestoreThread(static_cast<PyThreadState*>(state_)); }

// ----- a call -----

NativeOp::Function NativeOp::choose(const Arguments& arguments, Function on_cpu, Function on_cuda) {
  const bool is_cuda = kEmulated || arguments.is_cuda();
  const Function found = is_cuda ? on_cuda : on_cpu;
  if (found == nullptr) raise(PyExc_NotImplementedError, is_cuda ? "not implemented on cuda" : "not implemented on the CPU");
  return found;
}

namespace {

// An op as a Python function: `self` of the function is a capsule of it.
struct Method {
  std::string name;
  size_t required = 0, parameters = 0;  // how many arguments a call has at least and at most
  PyMethodDef definition{};
  NativeOp::Call call = nullptr;
  NativeOp::Function on_cpu = nullptr, on_cuda = nullptr;
};

PyObject* call_method(PyObject* self, PyObject* const* objects, Py_ssize_t count) {
  const auto& method = *static_cast<const Method*>(PyCapsule_GetPointer(self, nullptr));
  try {
    const auto given = static_cast<size_t>(count);
    if (given < method.required || given > method.parameters) {
      raise(PyExc_TypeError, "got " + std::to_string(given) + " arguments for " + method.definition.ml_doc);
    }
    Arguments arguments(reinterpret_cast<PythonObject* const*>(objects), given);
    return object_of(method.call(arguments, method.on_cpu, method.on_cuda));
  } catch (const PythonError&) {
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

// The name and the parameters of a schema; those with a default come last.
Method parse(const std::string& schema) {
  const size_t open = schema.find('('), end = schema.find(") -> ");
  Method method;
  method.name = schema.substr(0, open);
  for (size_t begin = open + 1; begin < end;) {
    const size_t comma = std::min(schema.find(", ", begin), end);
    ++method.parameters;
    if (schema.find('=', begin) > comma) ++method.required;
    begin = comma + 2;
  }
  return method;
}

// What implements the op of a schema; nothing where this library was built without it.
Method method_of(const char* schema) {
  Method method = parse(schema);
  for (const NativeOp* op = NativeOp::first; op != nullptr; op = op->next) {
    if (method.name != op->name) continue;
    if ((method.call != nullptr && method.call != op->call) || op->parameters != method.parameters) {
      raise(PyExc_ImportError, method.name + " has another type than its schema says");
    }
    method.call = op->call;
    if (op->device != Device::kCuda) method.on_cpu = op->function;
    if (op->device != Device::kCpu) method.on_cuda = op->function;
  }
  return method;
}

void add_method(PyObject* module, const char* schema) {
  static auto& methods = *new std::deque<Method>;  // which the module's functions point into
  methods.push_back(method_of(schema));
  Method& method = methods.back();
  if (method.call == nullptr) return;
  const auto function = reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call_method));
  method.definition = {method.name.c_str(), function, METH_FASTCALL, schema};
  PyObject* const self = PyCapsule_New(&method, nullptr, nullptr);
  PyObject* const object = self == nullptr ? nullptr : PyCFunction_NewEx(&method.definition, self, nullptr);
  Py_XDECREF(self);
  const int failed = object == nullptr ? -1 : PyObject_SetAttrString(module, method.name.c_str(), object);
  Py_XDECREF(object);
  if (failed != 0) throw PythonError();
}

PyObject* attribute(PyObject* object, const char* name) {
  PyObject* const found = object == nullptr ? nullptr : PyObject_GetAttrString(object, name);
  if (found == nullptr) throw PythonError();
  return found;  // of the interpreter's lifetime, as what is torch's
}

void fill(PyObject* module) {
  PyObject* const torch = PyImport_ImportModule("torch");
  PyObject* const capsule = attribute(attribute(torch, "Tensor"), "__dlpack_c_exchange_api__");
  exchange = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  if (exchange == nullptr) throw PythonError();
  if (exchange->header.version.major != DLPACK_MAJOR_VERSION) raise(PyExc_ImportError, "torch has another version of DLPack");
  for (Dtype& dtype : dtypes) dtype.object = attribute(torch, dtype.name);
  PyObject* const schemas = PyList_New(0);
  if (schemas == nullptr || PyObject_SetAttrString(module, "schemas", schemas) != 0) throw PythonError();
  for (const char* const* schema = kSchemas; *schema != nullptr; ++schema) {
    PyObject* const text = PyUnicode_FromString(*schema);
    if (text == nullptr || PyList_Append(schemas, text) != 0) throw PythonError();
    add_method(module, *schema);
  }
}

}  // namespace
}  // namespace mpk

#define MPK_JOIN(a, b) a##b
#define MPK_INIT(name) MPK_JOIN(PyInit_, name)
#define MPK_STRING_OF(name) #name
#define MPK_STRING(name) MPK_STRING_OF(name)

PyMODINIT_FUNC MPK_INIT(TORCH_EXTENSION_NAME)() {
  static PyModuleDef definition{
      PyModuleDef_HEAD_INIT, MPK_STRING(TORCH_EXTENSION_NAME), nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  PyObject* const module = PyModule_Create(&definition);
  if (module == nullptr) return nullptr;
  try {
    mpk::fill(module);
    return module;
  } catch (const mpk::PythonError&) {
  }
  Py_DECREF(module);
  return nullptr;
}
