# CMake toolchain file: builds for 64-bit ARM with Debian's cross compiler and runs what it built under qemu-user.
#
# cmake -S . -B build/arm -DCMAKE_TOOLCHAIN_FILE=tools/aarch64-linux-gnu.cmake -DNANOBRAID_CUDA=OFF
# Needs g++-aarch64-linux-gnu, libc6-dev-arm64-cross and qemu-user. QEMU_CPU in the environment chooses the processor.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_CROSSCOMPILING_EMULATOR qemu-aarch64 -L /usr/aarch64-linux-gnu)
set(CMAKE_FIND_ROOT_PATH /usr/aarch64-linux-gnu)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_PACKAGE ONLY)
