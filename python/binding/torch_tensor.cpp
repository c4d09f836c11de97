// Attributes of a tensor, asked for one by one.
#include "torch_tensor.hpp"

#include <algorithm>
#include <array>
#include <string_view>

namespace keyfold::python {
namespace {

constexpr std::size_t kMostAxes = 4;  // of what keyfold takes

/// Of the module torch, looked up once and never released.
struct Torch {
  struct Type {
    nb::object dtype;
    nb::dlpack::dtype as;
  };
  nb::object tensor, strided, current_stream;
  std::array<Type, 5> types;
};

/// Names of attributes, made once, as a short call asks for 50.
struct Names {
  static nb::object made(const char* name) { return nb::steal(PyUnicode_InternFromString(name)); }
  nb::object requires_grad = made("requires_grad"), is_conj = made("is_conj"),
             is_neg = made("is_neg"), layout = made("layout"), get_device = made("get_device"),
             is_cuda = made("is_cuda"), is_cpu = made("is_cpu"), dtype = made("dtype"),
             shape = made("shape"), stride = made("stride"), data_ptr = made("data_ptr");
};

const Names& names() {
  static const auto& all = *new Names;  // guarded by the GIL, never released
  return all;
}

Torch* look_up() {
  const nb::object torch = nb::module_::import_("torch");
  using Of = nb::dlpack::dtype_code;
  const auto type = [&](const char* name, Of code, std::uint8_t bits) {
    return Torch::Type{torch.attr(name), {static_cast<std::uint8_t>(code), bits, 1}};
  };
  return new Torch{
      torch.attr("Tensor"),
      torch.attr("strided"),
      nb::getattr(torch.attr("_C"), "_cuda_getCurrentRawStream", nb::none()),
      {type("float32", Of::Float, 32), type("float16", Of::Float, 16),
       type("bfloat16", Of::Bfloat, 16), type("bool", Of::Bool, 8), type("int32", Of::Int, 32)}};
}

/// Null where `object` is no tensor of PyTorch's own class, as parameters and subclasses are not.
const Torch* torch_of(nb::handle object) {
  static const Torch* torch = nullptr;  // guarded by the GIL
  if (torch == nullptr) {
    const nb::object name = nb::getattr(object.type(), "__module__", nb::none());
    if (!nb::isinstance<nb::str>(name) || std::string_view(nb::str(name).c_str()) != "torch") {
      return nullptr;
    }
    torch = look_up();
  }
  return object.type().is(torch->tensor) ? torch : nullptr;
}

bool says(nb::handle object, nb::handle method) { return nb::cast<bool>(object.attr(method)()); }

}  // namespace

nb::ndarray<nb::ro> from_torch(nb::handle object, std::optional<std::uintptr_t> stream) {
  const Torch* const torch = torch_of(object);
  if (torch == nullptr) return {};
  const Names& name = names();
  if (nb::cast<bool>(object.attr(name.requires_grad)) || says(object, name.is_conj) ||
      says(object, name.is_neg) || !object.attr(name.layout).is(torch->strided)) {
    return {};
  }
  const int index = nb::cast<int>(object.attr(name.get_device)());  // -1 on the host
  int device = nb::device::cpu::value;
  if (nb::cast<bool>(object.attr(name.is_cuda))) {
    if (!stream || torch->current_stream.is_none()) return {};
    if (nb::cast<std::uintptr_t>(torch->current_stream(index)) != *stream) return {};
    device = nb::device::cuda::value;
  } else if (!nb::cast<bool>(object.attr(name.is_cpu))) {
    return {};
  }
  const nb::object dtype = object.attr(name.dtype);
  const auto type = std::find_if(torch->types.begin(), torch->types.end(),
                                 [&](const Torch::Type& t) { return t.dtype.is(dtype); });
  if (type == torch->types.end()) return {};
  const nb::tuple shape(object.attr(name.shape)), strides(object.attr(name.stride)());
  const std::size_t axes = shape.size();
  if (axes > kMostAxes) return {};
  std::array<std::size_t, kMostAxes> sizes{};
  std::array<std::int64_t, kMostAxes> steps{};
  for (std::size_t i = 0; i < axes; ++i) {
    sizes[i] = nb::cast<std::size_t>(shape[i]);
    steps[i] = nb::cast<std::int64_t>(strides[i]);
  }
  const auto address = nb::cast<std::uintptr_t>(object.attr(name.data_ptr)());
  // NOLINTNEXTLINE(performance-no-int-to-ptr): PyTorch gives it as a number.
  void* const data = reinterpret_cast<void*>(address);
  return nb::ndarray<nb::ro>(data, axes, sizes.data(), object, steps.data(), type->as, device,
                             device == nb::device::cpu::value ? 0 : index);
}

}  // namespace keyfold::python
