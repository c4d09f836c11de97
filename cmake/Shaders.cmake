# keyfold_shaders(target source...): compiles GLSL to SPIR-V and embeds it: shaders/attend.comp
# becomes the array `attend_spv` in the generated header shaders/attend.spv.h.
function(keyfold_shaders target)
  foreach(source IN LISTS ARGN)
    get_filename_component(name ${source} NAME_WE)
    set(input ${CMAKE_CURRENT_SOURCE_DIR}/${source})
    set(output ${CMAKE_CURRENT_BINARY_DIR}/shaders/${name}.spv.h)
    add_custom_command(
      OUTPUT ${output}
      COMMAND ${GLSLANG_VALIDATOR} --quiet -V --target-env vulkan1.2 --vn ${name}_spv
              --depfile ${output}.d -o ${output} ${input}
      DEPENDS ${input}
      DEPFILE ${output}.d
      COMMENT "Compiling shader ${source}"
      VERBATIM)
    target_sources(${target} PRIVATE ${output})
  endforeach()
  target_include_directories(${target} PRIVATE ${CMAKE_CURRENT_BINARY_DIR}/shaders)
endfunction()
