// Every instruction that C++ has no name for, once, with a twin for the emulator. No other file has inline assembly.
#pragma once

#include "cuda/device.cuh"

namespace nb::cuda {

#if defined(__CUDACC__)

/// Lets the next kernel of the stream start as soon as all blocks have said so or ended.
NB_DEVICE void grid_trigger() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/// Waits until the kernel before has completed. Before a kernel's first write, and its first read of what that made.
NB_DEVICE void grid_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/// Loads 16 bytes that are read once. Written so that the compiler leaves it above grid_wait().
NB_DEVICE uint4 load_weight(const void* address) {
  uint4 value;
  asm volatile("ld.global.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(address)
               : "memory");
  return value;
}

/// Starts to copy 16 bytes into shared memory, or writes zeros there if `valid` is false. Arrives with cp_async_wait().
template <class T>
NB_DEVICE void cp_async16(T* to, const void* from, bool valid = true) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
}

/// Closes a group of copies.
NB_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/// Waits until at most so many of the calling thread's groups are under way. Others see the copies after a barrier.
template <int kGroupsLeft>
NB_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
}

/// Four 8 x 8 matrices of 16-bit numbers: lane i gives the address of row i % 8 of matrix i / 8 (16 bytes, aligned).
/// Lane i gets of every matrix numbers 2 (i % 4) and the next one of row i / 4.
template <class T>
NB_DEVICE void ldmatrix_x4(unsigned (&out)[4], const T* row) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
}

/// The same with every matrix transposed: lane i gets numbers (2 (i % 4), i / 4) and (2 (i % 4) + 1, i / 4).
template <class T>
NB_DEVICE void ldmatrix_x4_transposed(unsigned (&out)[4], const T* row) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
}

/// d += A B with A 16 x 16 and B 16 x 8 of bf16, d f32. With g = lane / 4, t = lane % 4 and pairs of numbers (low half
/// first): a[0] = A(g, 2t), a[1] = A(g + 8, 2t), a[2] = A(g, 2t + 8), a[3] = A(g + 8, 2t + 8); b[0] = B(2t, g) and
/// B(2t + 1, g), b[1] = B(2t + 8, g) and B(2t + 9, g); d[0], d[1] = D(g, 2t), D(g, 2t + 1); d[2], d[3] the same of row
/// g + 8.
NB_DEVICE void mma_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/// The same of fp16.
NB_DEVICE void mma_fp16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#else

/// Copies bytes into shared memory in the background; see emulation::copy_async().
template <class T>
void cp_async16(SharedPtr<T> to, const void* from, bool valid = true,
                emulation::Where where = emulation::Where::current()) {
  emulation::copy_async(raw(to), from, valid ? 16 : 0, valid ? 0 : 16, where);
}
inline void cp_async_commit() { emulation::copy_async_commit(); }
template <int kGroupsLeft>
void cp_async_wait() {
  emulation::copy_async_wait(kGroupsLeft);
}

void load_matrices(unsigned (&out)[4], const void* row, bool transposed, const emulation::Where& where);
void multiply_matrices(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], bool are_bf16,
                       const emulation::Where& where);

template <class T>
void ldmatrix_x4(unsigned (&out)[4], SharedPtr<T> row, emulation::Where where = emulation::Where::current()) {
  load_matrices(out, raw(row), false, where);
}
template <class T>
void ldmatrix_x4_transposed(unsigned (&out)[4], SharedPtr<T> row,
                            emulation::Where where = emulation::Where::current()) {
  load_matrices(out, raw(row), true, where);
}
inline void mma_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                     emulation::Where where = emulation::Where::current()) {
  multiply_matrices(d, a, b, true, where);
}
inline void mma_fp16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                     emulation::Where where = emulation::Where::current()) {
  multiply_matrices(d, a, b, false, where);
}

inline void grid_trigger() {}
inline void grid_wait() {}
inline uint4 load_weight(const void* address) {
  uint4 value;
  std::memcpy(&value, address, sizeof(value));
  return value;
}

#endif

}  // namespace nb::cuda
