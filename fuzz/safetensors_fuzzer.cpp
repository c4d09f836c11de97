// Any bytes as a safetensors file: each tensor is read or refused with InvalidArgument, nothing
// else.
#include "io/safetensors.hpp"
#include "keyfold/error.hpp"
#include "touch.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using keyfold::InvalidArgument;
  try {
    const keyfold::io::SafetensorsIndex index("input", std::as_bytes(std::span(data, size)));
    for (const auto& entry : index.entries()) {
      try {
        keyfold::fuzz::touch(index.find(entry.name));
      } catch (const InvalidArgument&) {
        continue;
      }
    }
  } catch (const InvalidArgument&) {
    return 0;
  }
  return 0;
}
