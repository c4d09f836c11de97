# Script: writes the text file `text` as a string into the C++ file `header`. Compilers limit how
# long one literal may be, so it is one of many that stand side by side.
file(READ ${text} content)
string(LENGTH "${content}" length)
set(literals "")
set(at 0)
while(at LESS length)
  string(SUBSTRING "${content}" ${at} 8000 part)
  string(APPEND literals "R\"keyfold(${part})keyfold\"\n")
  math(EXPR at "${at} + 8000")
endwhile()
string(MAKE_C_IDENTIFIER ${name} name)
file(WRITE ${header} "#pragma once
namespace keyfold::kernels {
constexpr char ${name}[] =
${literals};
}
")
