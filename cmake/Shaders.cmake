# keyfold_shaders(target shader...): gives `target` each shader as a header of words. attend.comp
# becomes "attend.comp.hpp" with `constexpr std::uint32_t attend_comp[]` in namespace
# keyfold::shaders. GLSL is compiled by the build, for Vulkan 1.2; SPIR-V (*.spv) is taken as it is.
function(keyfold_shaders target)
  set(folder ${CMAKE_CURRENT_BINARY_DIR}/${target}_shaders)
  file(MAKE_DIRECTORY ${folder})
  target_include_directories(${target} PRIVATE ${folder})
  foreach(shader IN LISTS ARGN)
    get_filename_component(source ${shader} ABSOLUTE)
    get_filename_component(name ${shader} NAME)
    set(words ${source})
    if(NOT name MATCHES "[.]spv$")
      set(words ${folder}/${name}.spv)
      add_custom_command(
        OUTPUT ${words}
        COMMAND ${KEYFOLD_GLSLANG} -V --quiet --target-env vulkan1.2 --depfile ${words}.d
                -o ${words} ${source}
        DEPENDS ${source} DEPFILE ${words}.d COMMENT "Compiling ${name}" VERBATIM)
    endif()
    set(embed ${PROJECT_SOURCE_DIR}/cmake/EmbedWords.cmake)
    add_custom_command(
      OUTPUT ${folder}/${name}.hpp
      COMMAND ${CMAKE_COMMAND} -D words=${words} -D header=${folder}/${name}.hpp -D name=${name}
              -P ${embed}
      DEPENDS ${words} ${embed} VERBATIM)
    target_sources(${target} PRIVATE ${folder}/${name}.hpp)
    list(APPEND headers ${folder}/${name}.hpp)
  endforeach()
  add_custom_target(${target}_shaders DEPENDS ${headers})
  if(NOT TARGET shaders)
    add_custom_target(shaders)  # all of them, for tools that read sources
  endif()
  add_dependencies(shaders ${target}_shaders)
endfunction()
