# Script: writes the SPIR-V file `words` as an array into the C++ file `header`.
file(READ ${words} hex HEX)
string(REGEX REPLACE "(..)(..)(..)(..)" "0x\\4\\3\\2\\1," hex "${hex}")
string(REGEX REPLACE "([^\n]{88})" "\\1\n" hex "${hex}")
string(MAKE_C_IDENTIFIER ${name} name)
file(WRITE ${header} "#pragma once
#include <cstdint>
namespace keyfold::shaders {
constexpr std::uint32_t ${name}[] = {
${hex}};
}
")
