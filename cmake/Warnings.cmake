# keyfold_warnings(target): the warnings that every target of this project is built with.
# GCC 12's -Wrestrict misfires inside std::string (GCC bug 105651).
function(keyfold_warnings target)
  target_compile_options(${target} PRIVATE -Wall -Wextra -Wpedantic -Wshadow -Wno-psabi
                                           $<$<CXX_COMPILER_ID:GNU>:-Wno-restrict>
                                           $<$<BOOL:${KEYFOLD_WERROR}>:-Werror>)
endfunction()
