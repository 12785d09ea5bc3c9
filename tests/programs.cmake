# The test programs. Included by CMakeLists.txt, so that paths are those of the root.

# GoogleTest: the system's sources (so that sanitizers cover it), an installed copy, or a download.
macro(nb_find_googletest)
  set(INSTALL_GTEST OFF)
  if(EXISTS /usr/src/googletest/CMakeLists.txt)
    add_subdirectory(/usr/src/googletest "${CMAKE_BINARY_DIR}/googletest" EXCLUDE_FROM_ALL)
    if(NANOBRAID_SANITIZE)
      target_compile_options(gtest PUBLIC -fsanitize=${NANOBRAID_SANITIZE})
      target_link_options(gtest PUBLIC -fsanitize=${NANOBRAID_SANITIZE})
    endif()
    add_library(nb_gtest ALIAS gtest_main)
  else()
    find_package(GTest QUIET)
    if(NOT GTest_FOUND)
      include(FetchContent)
      FetchContent_Declare(googletest URL https://github.com/google/googletest/archive/refs/tags/v1.14.0.tar.gz)
      FetchContent_MakeAvailable(googletest)
    endif()
    add_library(nb_gtest INTERFACE)
    target_link_libraries(nb_gtest INTERFACE GTest::gtest_main)
  endif()
endmacro()

include(GoogleTest)
# With the objects of another build the tests themselves are not sanitized; what they test is, and of inline functions the
# sanitized copy is taken, since the core comes first when a program is linked.
set(NANOBRAID_TEST_OBJECTS "" CACHE PATH "Another build: its compiled tests are linked, and only what they test is compiled")
if(NANOBRAID_TEST_OBJECTS)
  include("${NANOBRAID_TEST_OBJECTS}/test_objects/gtest.cmake")
  add_library(nb_gtest INTERFACE)
  target_link_libraries(nb_gtest INTERFACE ${gtest_objects})
else()
  nb_find_googletest()
  if(TARGET gtest_main)
    file(GENERATE OUTPUT "${CMAKE_BINARY_DIR}/test_objects/gtest.cmake"
         CONTENT "set(gtest_objects \"$<TARGET_FILE:gtest_main>;$<TARGET_FILE:gtest>\")\n")
  endif()
endif()
# nb_test_program(NAME SOURCES): a program of tests with one precompiled header for all. Little optimised: half of what a
# build takes is tests, and they end soon.
function(nb_test_program target)
  if(NANOBRAID_TEST_OBJECTS)
    include("${NANOBRAID_TEST_OBJECTS}/test_objects/${target}.cmake")
    list(FILTER test_objects EXCLUDE REGEX "\\.gch$")
    add_executable(${target} EXCLUDE_FROM_ALL ${test_objects})
    set_target_properties(${target} PROPERTIES LINKER_LANGUAGE CXX)
    target_link_options(${target} PRIVATE "LINKER:--whole-archive,$<TARGET_FILE:nanobraid_core>,--no-whole-archive")
    target_link_libraries(${target} PRIVATE nanobraid_core nb_gtest)
    return()
  endif()
  add_executable(${target} EXCLUDE_FROM_ALL ${ARGN})
  target_include_directories(${target} PRIVATE "${CMAKE_CURRENT_SOURCE_DIR}/tests/cpp")
  target_link_libraries(${target} PRIVATE nanobraid_core nb_gtest)
  target_compile_options(${target} PRIVATE $<$<CONFIG:Release>:-O1>)
  file(GENERATE OUTPUT "${CMAKE_BINARY_DIR}/test_objects/${target}.cmake"
       CONTENT "set(test_objects \"$<TARGET_OBJECTS:${target}>\")\n")
  if(NOT NANOBRAID_PRECOMPILE)
    return()
  endif()
  target_compile_options(${target} PRIVATE "${precompiled_flags}")
  if(target STREQUAL "base_tests")
    target_precompile_headers(base_tests PRIVATE <gtest/gtest.h> ${common_headers})
  else()
    target_precompile_headers(${target} REUSE_FROM base_tests)
  endif()
endfunction()
set(long_modules model ops cuda engine)  # the last of them first
# Tests that ctest runs, one process each; the modules with the longest ones first, so that none of them is left for last.
function(nb_discover_tests target prefix)
  set_target_properties(${target} PROPERTIES EXCLUDE_FROM_ALL OFF)
  list(FIND long_modules ${prefix} cost)
  math(EXPR cost "${cost} + 1")
  gtest_discover_tests(${target} TEST_PREFIX ${prefix}. DISCOVERY_TIMEOUT 120 PROPERTIES TIMEOUT 600 COST ${cost} ${ARGN})
endfunction()
foreach(module base tensor quant text ops kv io model sampling engine)
  file(GLOB sources CONFIGURE_DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/tests/cpp/${module}/*_test.cpp")
  if(sources)
    nb_test_program(${module}_tests ${sources})
    nb_discover_tests(${module}_tests ${module})
  endif()
endforeach()
# The CUDA kernels as C++, run by the emulator: the same sources, included by files that are compiled as C++.
file(GLOB cuda_sources CONFIGURE_DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/cuda/*.cu")
list(FILTER cuda_sources EXCLUDE REGEX "/(runtime|plugin)\\.cu$")
set(emulated_sources)
foreach(source ${cuda_sources})
  get_filename_component(name "${source}" NAME_WE)
  file(CONFIGURE OUTPUT "${CMAKE_BINARY_DIR}/cuda_emulation/${name}.cpp" CONTENT "#include \"${source}\"\n")
  list(APPEND emulated_sources "${CMAKE_BINARY_DIR}/cuda_emulation/${name}.cpp")
endforeach()
file(GLOB emulation_sources CONFIGURE_DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/tests/cuda_emulation/*.cpp")
file(GLOB emulation_tests CONFIGURE_DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/tests/cuda_emulation/*_test.cpp"
     "${CMAKE_CURRENT_SOURCE_DIR}/tests/cuda_emulation/coverage.cpp")
list(REMOVE_ITEM emulation_sources ${emulation_tests})
add_library(cuda_emulation OBJECT ${emulated_sources} ${emulation_sources})
target_include_directories(cuda_emulation PUBLIC "${CMAKE_CURRENT_SOURCE_DIR}" "${CMAKE_CURRENT_SOURCE_DIR}/tests"
                           "${CMAKE_CURRENT_SOURCE_DIR}/tests/cpp")
target_link_libraries(cuda_emulation PUBLIC nanobraid_core PRIVATE nb_kernel_checks)
# GCC sees reads of words that only the other kind of key has (Eight<Sealed>), which nothing reaches.
target_compile_options(cuda_emulation PRIVATE -Wno-maybe-uninitialized $<$<CONFIG:Debug>:-O1>)
nb_test_program(cuda_emulation_tests ${emulation_tests})
target_link_libraries(cuda_emulation_tests PRIVATE cuda_emulation)
file(MAKE_DIRECTORY "${CMAKE_BINARY_DIR}/cuda_emulation/runs")
nb_discover_tests(cuda_emulation_tests cuda ENVIRONMENT
                  "NANOBRAID_EMULATED_KERNELS=${CMAKE_BINARY_DIR}/cuda_emulation/runs")
if(NANOBRAID_TEST_OBJECTS)
  return()  # what follows is there in the other build
endif()
# What tests/arm.sh runs on an emulated processor: the operators and an engine, in one program of few sources.
set(cross_sources tests/cpp/ops/linear_test.cpp tests/cpp/ops/ops_test.cpp tests/cpp/ops/attention_test.cpp
    tests/cpp/engine/engine_test.cpp)
nb_test_program(cross_tests ${cross_sources})
# What ThreadSanitizer watches, without the rest of the tests of these modules.
nb_test_program(thread_tests tests/cpp/base/threads_test.cpp tests/cpp/engine/engine_thread_test.cpp
                tests/cpp/engine/load_queue_test.cpp tests/cpp/engine/outbox_test.cpp
                tests/cpp/model/layer_stream_test.cpp)
# The same as a library that the core opens like that of a GPU, for tests from Python.
add_library(nanobraid_cuda_emulated MODULE)
set_target_properties(nanobraid_cuda_emulated PROPERTIES LINKER_LANGUAGE CXX)
target_link_libraries(nanobraid_cuda_emulated PRIVATE cuda_emulation)
# Libraries for the tests of what opens the CUDA library: a good one, and every way to be a wrong one.
foreach(kind complete incomplete unusable other_version without_entry)
  add_library(test_plugin_${kind} MODULE tests/cpp/ops/test_plugin.cpp)
  target_compile_definitions(test_plugin_${kind} PRIVATE TEST_PLUGIN_${kind})
  target_link_libraries(test_plugin_${kind} PRIVATE nb_flags)
  add_dependencies(ops_tests test_plugin_${kind})
endforeach()
target_compile_definitions(ops_tests PRIVATE TEST_PLUGIN_FOLDER="${CMAKE_CURRENT_BINARY_DIR}")
# Renders conversations that tests/python/test_demos.py compares with jinja2.
add_executable(chat_render_pipe tests/cpp/text/chat_render_pipe.cpp)
target_link_libraries(chat_render_pipe PRIVATE nanobraid_core)
