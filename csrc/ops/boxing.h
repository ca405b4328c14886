// The arguments of a call as torch's dispatcher hands them over. Every tensor is asked once, at the start, for what the
// checks want to know, and nothing is copied: with torch::stable::Tensor, a shared_ptr whose every question is a call
// into torch, and with TORCH_BOX, which copies all arguments, most of a small call's time on the host went there.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

namespace polylora::ops {

/// Torch's numbers for dtypes. Its stable ABI promises the functions, not their values.
namespace dtype {
inline const int32_t kBFloat16 = aoti_torch_dtype_bfloat16();
inline const int32_t kFloat16 = aoti_torch_dtype_float16();
inline const int32_t kFloat32 = aoti_torch_dtype_float32();
inline const int32_t kInt32 = aoti_torch_dtype_int32();
inline const int32_t kInt64 = aoti_torch_dtype_int64();
inline const int32_t kUInt8 = aoti_torch_dtype_uint8();
}  // namespace dtype

/// Torch's numbers for devices.
namespace device_type {
inline const int32_t kCpu = aoti_torch_device_type_cpu();
inline const int32_t kCuda = aoti_torch_device_type_cuda();
inline const int32_t kMeta = aoti_torch_device_type_meta();
}  // namespace device_type

/// A tensor of the call. Owns its handle, not the data.
class Tensor {
 public:
  explicit Tensor(AtenTensorHandle handle) : handle_(handle) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &dim_));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &sizes_));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &strides_));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle, &dtype_));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle, &device_type_));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(handle, &device_index_));
  }

  int64_t dim() const { return dim_; }
  int64_t size(int64_t i) const { return sizes_[i]; }      // i in [0, dim)
  int64_t stride(int64_t i) const { return strides_[i]; }  // i in [0, dim)
  int32_t dtype() const { return dtype_; }
  int32_t device_type() const { return device_type_; }
  int32_t device_index() const { return device_index_; }
  bool is_cpu() const { return device_type_ == device_type::kCpu; }
  bool is_cuda() const { return device_type_ == device_type::kCuda; }
  bool is_meta() const { return device_type_ == device_type::kMeta; }

  bool is_contiguous() const {
    bool contiguous = false;
    TORCH_ERROR_CODE_CHECK(aoti_torch_is_contiguous(handle_.get(), &contiguous));
    return contiguous;
  }

  void* data_ptr() const {
    void* data = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(handle_.get(), &data));
    return data;
  }

 private:
  struct Delete {
    void operator()(AtenTensorHandle handle) const { aoti_torch_delete_tensor_object(handle); }
  };
  std::unique_ptr<AtenTensorOpaque, Delete> handle_;
  int64_t dim_ = 0;
  int64_t* sizes_ = nullptr;    // [dim], torch's
  int64_t* strides_ = nullptr;  // [dim], torch's
  int32_t dtype_ = 0;
  int32_t device_type_ = 0;
  int32_t device_index_ = 0;
};

using TensorList = std::vector<Tensor>;
using IntList = std::vector<int64_t>;
using OptionalTensor = std::optional<Tensor>;

/// `bytes` of memory on the device of `like`.
inline Tensor empty_bytes(int64_t bytes, const Tensor& like) {
  const int64_t stride = 1;
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(1, &bytes, &stride, dtype::kUInt8, like.device_type(), like.device_index(), &handle));
  return Tensor(handle);
}

/// An argument from its place on the stack, whose memory it takes over.
template <class T>
struct Unbox {
  static T from(StableIValue value) { return torch::stable::detail::to<T>(value); }
};

template <>
struct Unbox<Tensor> {
  static Tensor from(StableIValue value) { return Tensor(torch::stable::detail::to<AtenTensorHandle>(value)); }
};

template <>
struct Unbox<OptionalTensor> {
  static OptionalTensor from(StableIValue value) {
    const auto handle = torch::stable::detail::to<std::optional<AtenTensorHandle>>(value);
    return handle ? OptionalTensor(*handle) : std::nullopt;
  }
};

template <class T>
struct Unbox<std::vector<T>> {
  static std::vector<T> from(StableIValue value) {
    struct Delete {
      void operator()(StableListHandle list) const { torch_delete_list(list); }
    };
    const std::unique_ptr<StableListOpaque, Delete> list(torch::stable::detail::to<StableListHandle>(value));
    size_t size = 0;
    TORCH_ERROR_CODE_CHECK(torch_list_size(list.get(), &size));
    std::vector<T> items;
    items.reserve(size);
    for (size_t i = 0; i < size; ++i) {
      StableIValue item;
      TORCH_ERROR_CODE_CHECK(torch_list_get_item(list.get(), i, &item));
      items.push_back(Unbox<T>::from(item));
    }
    return items;
  }
};

/// The boxed form of an op's function.
template <auto kFunction>
struct Boxed;

template <class... Args, void (*kFunction)(Args...)>
struct Boxed<kFunction> {
  static void call(StableIValue* stack, uint64_t num_args, uint64_t num_outputs) {
    STD_TORCH_CHECK(num_args == sizeof...(Args) && num_outputs == 0, "polylora: an op's schema has ", num_args,
                    " arguments and ", num_outputs, " outputs, its function ", sizeof...(Args), " and 0");
    unpack(stack, std::index_sequence_for<Args...>{});
  }

 private:
  template <size_t... I>
  static void unpack(StableIValue* stack, std::index_sequence<I...>) {
    kFunction(Unbox<Args>::from(stack[I])...);
  }
};

}  // namespace polylora::ops
