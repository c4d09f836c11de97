# keyfold_kernels(target file...): gives `target` each file of CUDA source as a string. attend.cu
# becomes "attend.cu.hpp" with `constexpr char attend_cu[]` in namespace keyfold::kernels.
function(keyfold_kernels target)
  set(folder ${CMAKE_CURRENT_BINARY_DIR}/${target}_kernels)
  file(MAKE_DIRECTORY ${folder})
  target_include_directories(${target} PRIVATE ${folder})
  set(embed ${PROJECT_SOURCE_DIR}/cmake/EmbedText.cmake)
  foreach(file IN LISTS ARGN)
    get_filename_component(source ${file} ABSOLUTE)
    get_filename_component(name ${file} NAME)
    add_custom_command(
      OUTPUT ${folder}/${name}.hpp
      COMMAND ${CMAKE_COMMAND} -D text=${source} -D header=${folder}/${name}.hpp -D name=${name}
              -P ${embed}
      DEPENDS ${source} ${embed} VERBATIM)
    target_sources(${target} PRIVATE ${folder}/${name}.hpp)
    list(APPEND headers ${folder}/${name}.hpp)
  endforeach()
  add_custom_target(${target}_kernels DEPENDS ${headers})
  if(NOT TARGET shaders)
    add_custom_target(shaders)  # all that is embedded, for tools that read sources
  endif()
  add_dependencies(shaders ${target}_kernels)
endfunction()
