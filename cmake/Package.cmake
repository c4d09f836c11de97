# Installs libkeyfold: library, headers, license, keyfoldConfig.cmake and keyfold.pc.
include(CMakePackageConfigHelpers)

get_target_property(keyfold_type keyfold TYPE)
set(keyfold_cmake_dir ${CMAKE_INSTALL_LIBDIR}/cmake/keyfold)

# What a program needs beside libkeyfold.a. A shared libkeyfold knows its own dependencies, and
# naming them would oblige its users to install their development packages.
if(keyfold_type STREQUAL "STATIC_LIBRARY")
  set(keyfold_cxx_runtime ${CMAKE_CXX_IMPLICIT_LINK_LIBRARIES})
  list(REMOVE_ITEM keyfold_cxx_runtime ${CMAKE_C_IMPLICIT_LINK_LIBRARIES})
  set(keyfold_pc_requires "libhwy tbb")
  list(TRANSFORM keyfold_cxx_runtime PREPEND "-l" OUTPUT_VARIABLE keyfold_pc_libs)
  list(JOIN keyfold_pc_libs " " keyfold_pc_libs)
  string(APPEND keyfold_pc_libs " ${CMAKE_THREAD_LIBS_INIT}")
endif()

# The tool, which is added after this file, finds the library beside it, wherever the prefix is.
set(CMAKE_INSTALL_RPATH "$ORIGIN/../${CMAKE_INSTALL_LIBDIR}")

install(TARGETS keyfold EXPORT keyfoldTargets)
if(KEYFOLD_MPI)
  # An export of its own, as only who asks for it needs MPI.
  install(TARGETS keyfold_mpi EXPORT keyfoldMpiTargets)
  install(EXPORT keyfoldMpiTargets NAMESPACE keyfold:: DESTINATION ${keyfold_cmake_dir})
endif()
if(KEYFOLD_BUILD_STORE)
  install(TARGETS keyfold_store EXPORT keyfoldTargets)
endif()
install(DIRECTORY include/keyfold DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(FILES LICENSE DESTINATION ${CMAKE_INSTALL_DOCDIR})

install(EXPORT keyfoldTargets NAMESPACE keyfold:: DESTINATION ${keyfold_cmake_dir})
configure_package_config_file(cmake/keyfoldConfig.cmake.in keyfoldConfig.cmake
                              INSTALL_DESTINATION ${keyfold_cmake_dir})
write_basic_package_version_file(keyfoldConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/keyfoldConfig.cmake
              ${PROJECT_BINARY_DIR}/keyfoldConfigVersion.cmake
        DESTINATION ${keyfold_cmake_dir})

get_target_property(keyfold_dlpack_dir dlpack::dlpack INTERFACE_INCLUDE_DIRECTORIES)
# Relative to the .pc file, so that `cmake --install --prefix` may put it anywhere.
file(RELATIVE_PATH keyfold_pc_prefix ${CMAKE_INSTALL_FULL_LIBDIR}/pkgconfig ${CMAKE_INSTALL_PREFIX})
string(REGEX REPLACE "/$" "" keyfold_pc_prefix "${keyfold_pc_prefix}")
configure_file(cmake/keyfold.pc.in keyfold.pc @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/keyfold.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
