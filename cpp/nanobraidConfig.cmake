# What find_package(nanobraid) reads in an installation: the target nanobraid::nanobraid and what it needs.
include(CMakeFindDependencyMacro)
find_dependency(Threads)
include("${CMAKE_CURRENT_LIST_DIR}/nanobraidTargets.cmake")
