// Python arrays as the library's views, without a copy.
#include "array.hpp"

#include <nanobind/stl/string.h>

#include <algorithm>
#include <keyfold/error.hpp>
#include <new>
#include <optional>
#include <string>

#include "torch_tensor.hpp"

namespace keyfold::python {
namespace {

using Code = nb::dlpack::dtype_code;

std::string shape_text(const nb::ndarray<nb::ro>& array) {
  std::string text = "[";
  for (std::size_t i = 0; i < array.ndim(); ++i) {
    text += (i ? ", " : "") + std::to_string(array.shape_ptr()[i]);
  }
  return text + "]";
}

std::string python_type(nb::handle object) {
  return nb::cast<std::string>(nb::str(object.type().attr("__name__")));
}

std::string dtype_text(nb::dlpack::dtype dtype) {
  static constexpr const char* kNames[] = {"int",    "uint",    "float", "opaque",
                                           "bfloat", "complex", "bool"};
  const std::string bits =
      dtype.code == static_cast<int>(Code::Bool) ? "" : std::to_string(dtype.bits);
  const std::string lanes = dtype.lanes == 1 ? "" : "x" + std::to_string(dtype.lanes);
  if (dtype.code >= std::size(kNames)) return "DLPack type " + std::to_string(dtype.code);
  return kNames[dtype.code] + bits + lanes;
}

std::optional<DType> dtype_of(nb::dlpack::dtype dtype) {
  if (dtype.lanes != 1) return std::nullopt;
  const auto is = [&](Code code, int bits) {
    return dtype.code == static_cast<int>(code) && dtype.bits == bits;
  };
  if (is(Code::Float, 32)) return DType::kFloat32;
  if (is(Code::Float, 16)) return DType::kFloat16;
  if (is(Code::Bfloat, 16)) return DType::kBFloat16;
  if (is(Code::Bool, 8) || is(Code::UInt, 8)) return DType::kBool;
  return std::nullopt;
}

/// NumPy has no way to hand over ml_dtypes' bfloat16, so its bits are taken as integers.
nb::object bits_of_bfloat16(nb::handle object) {
  if (!nb::hasattr(object, "dtype") || !nb::hasattr(object, "view")) return {};
  const nb::str dtype(nb::handle(object.attr("dtype")));
  if (std::string_view(dtype.c_str()) != "bfloat16") return {};
  return object.attr("view")("uint16");
}

/// What the array's own __dlpack__ says against handing it over; empty if it has none.
std::string own_words(nb::handle object) {
  try {
    object.attr("__dlpack__")();
  } catch (nb::python_error& error) {
    if (error.matches(PyExc_AttributeError)) return {};
    return nb::cast<std::string>(nb::str(error.value()));
  }
  return {};
}

[[noreturn]] void refuse(nb::handle object, const char* name) {
  const std::string reason = own_words(object);
  if (!reason.empty()) {
    throw InvalidArgument(
        name, "expected an array whose memory can be shared, got one that says: " + reason);
  }
  const std::string text = std::string(name) +
                           ": expected an array (NumPy's, or any with __dlpack__), got " +
                           python_type(object);
  throw nb::type_error(text.c_str());
}

bool on_cuda(int device_type) {
  return device_type == nb::device::cuda::value || device_type == nb::device::cuda_managed::value;
}
bool on_host(int device_type) {
  return device_type == nb::device::cpu::value || device_type == nb::device::cuda_host::value;
}

/// What `object` gives for use on a stream, by its __dlpack__: its own work that is queued
/// elsewhere comes first. Invalid where that is not for it: it is on the host, or no array.
nb::object capsule_for(nb::handle object, Array::Stream stream) {
  if (!stream || !nb::hasattr(object, "__dlpack_device__")) return {};
  const nb::object device = object.attr("__dlpack_device__")();
  if (!on_cuda(nb::cast<int>(nb::int_(device[0])))) return {};
  // DLPack's number of the default stream is 1.
  const nb::int_ number(*stream == 0 ? std::uintptr_t{1} : *stream);
  try {
    return object.attr("__dlpack__")(nb::arg("stream") = number,
                                     nb::arg("max_version") = nb::make_tuple(1, 0));
  } catch (nb::python_error& error) {
    if (!error.matches(PyExc_TypeError)) throw;  // of before 2023, it knows no versions
  }
  return object.attr("__dlpack__")(nb::arg("stream") = number);
}

}  // namespace

Array Array::checked(nb::ndarray<nb::ro> held, bool bfloat16_bits, const char* name,
                     Stream stream) {
  const int type = held.device_type();
  if (!on_host(type) && !(on_cuda(type) && stream)) {
    const std::string expected = stream ? "an array in the memory of the host or of a CUDA device"
                                        : "an array in host memory";
    throw InvalidArgument(name, "expected " + expected + ", got one on a device (DLPack type " +
                                    std::to_string(type) + ", number " +
                                    std::to_string(held.device_id()) + "); copy it to the host");
  }
  const std::optional<DType> dtype = bfloat16_bits ? DType::kBFloat16 : dtype_of(held.dtype());
  if (!dtype) {
    throw InvalidArgument(name,
                          "expected a dtype that keyfold computes in (float32, float16, bfloat16; "
                          "bool for masks), got " +
                              dtype_text(held.dtype()));
  }
  if (std::any_of(held.shape_ptr(), held.shape_ptr() + held.ndim(),
                  [](std::int64_t size) { return size < 0; })) {
    throw InvalidArgument(name, "expected sizes of at least 0, got " + shape_text(held));
  }
  return {std::move(held), *dtype, name};
}

Array Array::to_read(nb::handle object, const char* name, Stream stream) {
  nb::ndarray<nb::ro> held = from_torch(object, stream);
  if (held.is_valid()) return checked(std::move(held), false, name, stream);
  const nb::object capsule = capsule_for(object, stream);
  if (nb::try_cast(capsule.is_valid() ? capsule : nb::borrow(object), held)) {
    return checked(std::move(held), false, name, stream);
  }
  const nb::object bits = bits_of_bfloat16(object);
  if (bits.is_valid() && nb::try_cast(bits, held)) {
    return checked(std::move(held), true, name, stream);
  }
  refuse(object, name);
}

Array Array::to_write(nb::handle object, const char* name, Stream stream) {
  if (nb::ndarray<nb::ro> tensor = from_torch(object, stream); tensor.is_valid()) {
    return checked(std::move(tensor), false, name, stream);
  }
  nb::ndarray<> held;
  const nb::object capsule = capsule_for(object, stream);
  if (nb::try_cast(capsule.is_valid() ? capsule : nb::borrow(object), held)) {
    return checked(nb::ndarray<nb::ro>(held), false, name, stream);
  }
  const nb::object bits = bits_of_bfloat16(object);
  if (bits.is_valid() && nb::try_cast(bits, held)) {
    return checked(nb::ndarray<nb::ro>(held), true, name, stream);
  }
  to_read(object, name, stream);  // throws when it is not even readable
  throw InvalidArgument(name, "expected a writable array, got a read-only one");
}

Device Array::device() const {
  if (!on_cuda(held_.device_type())) return {};
  return {DeviceType::kCuda, static_cast<int>(held_.device_id())};
}

std::pair<nb::ndarray<nb::ro>, const std::int32_t*> device_lengths(nb::handle object,
                                                                   std::uintptr_t stream) {
  nb::ndarray<nb::ro> held = from_torch(object, stream);
  if (!held.is_valid()) {
    const nb::object capsule = capsule_for(object, stream);
    if (!capsule.is_valid() || !nb::try_cast(capsule, held)) refuse(object, "kv_lens");
  }
  const nb::dlpack::dtype dtype = held.dtype();
  if (dtype.code != static_cast<int>(Code::Int) || dtype.bits != 32 || held.ndim() != 1 ||
      (held.shape_ptr()[0] > 1 && held.stride(0) != 1)) {
    throw InvalidArgument("kv_lens",
                          "expected, on a CUDA device, dense int32 lengths [batch], got " +
                              dtype_text(dtype) + " of the shape " + shape_text(held));
  }
  const auto* const data = static_cast<const std::int32_t*>(held.data());
  return {std::move(held), data};
}

std::vector<std::int64_t> Array::shape() const {
  return {held_.shape_ptr(), held_.shape_ptr() + held_.ndim()};
}

MutableTensorView Array::view_of_axes(const std::size_t* axes, std::size_t count) const {
  MutableTensorView view;
  // The library writes only through views that came from to_write().
  view.data = const_cast<void*>(static_cast<const void*>(held_.data()));
  view.dtype = dtype_;
  view.device = device();
  view.sizes = {1, 1, 1, 1};
  view.strides = {0, 0, 0, 0};
  for (std::size_t i = 0; i < count; ++i) {
    view.sizes[axes[i]] = held_.shape_ptr()[i];
    view.strides[axes[i]] = held_.stride(i);
  }
  return view;
}

MutableTensorView Array::view(Axes axes) const {
  static constexpr const char* kNames[] = {"batch", "heads", "len", "dim"};
  if (held_.ndim() != axes.size()) {
    std::string expected;
    for (const std::size_t axis : axes) {
      expected += (expected.empty() ? "" : ", ") + std::string(kNames[axis]);
    }
    throw InvalidArgument(
        name_, "expected the axes [" + expected + "], got the shape " + shape_text(held_));
  }
  return view_of_axes(axes.begin(), axes.size());
}

MutableTensorView Array::view_trailing() const {
  if (held_.ndim() > kAllAxes.size()) {
    throw InvalidArgument(name_,
                          "expected at most 4 axes [batch, heads, q_len, kv_len], got the shape " +
                              shape_text(held_));
  }
  return view_of_axes(kAllAxes.end() - held_.ndim(), held_.ndim());
}

DType dtype_named(std::string_view name) {
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    if (name == name_of(dtype)) return dtype;
  }
  throw InvalidArgument("dtype", "expected float32, float16 or bfloat16, got " + std::string(name));
}

nb::object make_empty(const std::vector<std::size_t>& shape, std::string_view dtype) {
  constexpr std::align_val_t kAlignment{64};  // what JAX asks for to share memory
  const bool wide = dtype == "float32";
  const nb::dlpack::dtype type{
      static_cast<std::uint8_t>(dtype == "bfloat16" ? Code::Bfloat : Code::Float),
      static_cast<std::uint8_t>(wide ? 32 : 16), 1};
  std::size_t bytes = wide ? 4 : 2;
  for (const std::size_t size : shape) {
    if (__builtin_mul_overflow(bytes, size, &bytes)) throw std::bad_alloc();
  }
  void* const memory = ::operator new(bytes, kAlignment);
  const nb::capsule owner(memory, [](void* p) noexcept { ::operator delete(p, kAlignment); });
  return nb::cast(
      nb::ndarray<nb::array_api>(memory, shape.size(), shape.data(), owner, nullptr, type));
}

}  // namespace keyfold::python
