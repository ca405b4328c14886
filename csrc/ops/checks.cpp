#include "checks.h"

#include <sstream>
#include <stdexcept>

namespace polylora::ops {
namespace {

const char* dtype_name(int32_t code) {
  const struct {
    int32_t code;
    const char* name;
  } known[] = {
      {dtype::kBFloat16, "bfloat16"},          {dtype::kFloat16, "float16"},      {dtype::kFloat32, "float32"},
      {aoti_torch_dtype_float64(), "float64"}, {dtype::kInt32, "int32"},          {dtype::kInt64, "int64"},
      {aoti_torch_dtype_int16(), "int16"},     {aoti_torch_dtype_int8(), "int8"}, {dtype::kUInt8, "uint8"},
      {aoti_torch_dtype_bool(), "bool"},
  };
  for (const auto& entry : known) {
    if (entry.code == code) return entry.name;
  }
  return "another dtype";
}

std::string device_name(int32_t type, int32_t index) {
  if (type == device_type::kCuda) return "cuda:" + std::to_string(index);
  return type == device_type::kCpu ? "cpu" : type == device_type::kMeta ? "meta" : "another device";
}

// As a message says where a tensor is. The fakes' tensors stand for others, whose device they do not know.
std::string on_device(int32_t type, int32_t index) {
  return type == device_type::kMeta ? "" : " on " + device_name(type, index);
}

// Sizes as a message shows them; kAny as the letter of its place.
std::string shape_text(Sizes sizes) {
  static const char* const kNames[] = {"n", "m", "k", "l"};
  std::string text = "[";
  for (size_t i = 0; i < sizes.size(); ++i) {
    const int64_t size = sizes.begin()[i];
    if (i) text += ", ";
    text += size == kAny ? kNames[i % 4] : std::to_string(size);
  }
  return text + "]";
}

bool sizes_match(const Tensor& t, Sizes sizes) {
  if (t.dim() != static_cast<int64_t>(sizes.size())) return false;
  int64_t i = 0;
  for (const int64_t size : sizes) {
    if (size != kAny && t.size(i) != size) return false;
    ++i;
  }
  return true;
}

}  // namespace

std::string describe(const Tensor& t) {
  std::ostringstream out;
  out << "[";
  for (int64_t i = 0; i < t.dim(); ++i) out << (i ? ", " : "") << t.size(i);
  out << "] " << dtype_name(t.dtype()) << on_device(t.device_type(), t.device_index());
  if (!t.is_contiguous()) {
    out << ", strides [";
    for (int64_t i = 0; i < t.dim(); ++i) out << (i ? ", " : "") << t.stride(i);
    out << "]";
  }
  return out.str();
}

Checker::Checker(const char* op, const Tensor& like)
    : op_(op), device_type_(like.device_type()), device_index_(like.device_index()) {}

void Checker::fail(const std::string& arg, const std::string& expected, const std::string& got) const {
  throw std::runtime_error(std::string("polylora::") + op_ + ": " + arg + " must be " + expected + ", got " + got);
}

void Checker::device(const char* arg, const Tensor& t) const {
  const bool same = t.device_type() == device_type_ && (!t.is_cuda() || t.device_index() == device_index_);
  if (!same) {
    fail(arg, "on " + device_name(device_type_, device_index_), describe(t) + (t.is_meta() ? " on meta" : ""));
  }
}

void Checker::matrix(const char* arg, const Tensor& t, int64_t rows, int64_t cols, int32_t dtype) const {
  const Sizes sizes{rows, cols};
  if (!sizes_match(t, sizes) || t.dtype() != dtype) {
    fail(arg, shape_text(sizes) + " " + dtype_name(dtype) + on_device(device_type_, device_index_), describe(t));
  }
  device(arg, t);
  const bool unit = t.size(1) <= 1 || t.stride(1) == 1;
  const bool apart = t.size(0) <= 1 || t.stride(0) >= t.size(1);
  if (!unit || !apart) fail(arg, "row-major: last stride 1, row stride at least the row's length", describe(t));
}

void Checker::contiguous(const char* arg, const Tensor& t, Sizes sizes, int32_t dtype) const {
  if (!sizes_match(t, sizes) || t.dtype() != dtype || !t.is_contiguous()) {
    fail(arg, shape_text(sizes) + " " + dtype_name(dtype) + on_device(device_type_, device_index_) + ", contiguous",
         describe(t));
  }
  device(arg, t);
}

bool Checker::ids(const char* arg, const Tensor& t, Sizes sizes) const {
  if (t.dtype() != dtype::kInt32 && t.dtype() != dtype::kInt64) {
    fail(arg, shape_text(sizes) + " int32 or int64", describe(t));
  }
  contiguous(arg, t, sizes, t.dtype());
  return t.dtype() == dtype::kInt64;
}

DType Checker::compute_dtype(const char* arg, const Tensor& t) const {
  if (t.dtype() == dtype::kBFloat16) return DType::kBFloat16;
  if (t.dtype() == dtype::kFloat16) return DType::kFloat16;
  if (t.dtype() == dtype::kFloat32) return DType::kFloat32;
  fail(arg, "bfloat16, float16 or float32", describe(t));
}

void Checker::aligned(const char* arg, const Tensor& t, int64_t bytes) const {
  if (t.is_meta()) return;
  const auto address = reinterpret_cast<uintptr_t>(t.data_ptr());
  if (address % bytes != 0) {
    fail(arg, "aligned to " + std::to_string(bytes) + " bytes",
         "a view that starts " + std::to_string(address % bytes) + " bytes behind");
  }
}

void Checker::range(const char* arg, int64_t value, int64_t lo, int64_t hi) const {
  if (value < lo || value > hi) {
    fail(arg, "in [" + std::to_string(lo) + ", " + std::to_string(hi) + "]", std::to_string(value));
  }
}

}  // namespace polylora::ops
