# keyfold_warnings(target): the warnings that every target of this project is built with.
function(keyfold_warnings target)
  target_compile_options(${target} PRIVATE -Wall -Wextra -Wpedantic -Wshadow -Wno-psabi
                                           $<$<BOOL:${KEYFOLD_WERROR}>:-Werror>)
endfunction()
