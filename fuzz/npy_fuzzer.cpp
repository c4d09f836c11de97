// Any bytes as a .npy file: read or refused with InvalidArgument, nothing else.
#include "io/npy.hpp"
#include "keyfold/error.hpp"
#include "touch.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  try {
    keyfold::fuzz::touch(keyfold::io::parse_npy("input", std::as_bytes(std::span(data, size))));
  } catch (const keyfold::InvalidArgument&) {
    return 0;
  }
  return 0;
}
