// Twins of the instructions of cuda/ptx.cuh that a whole warp executes together.
#include "cuda/ptx.cuh"

#include <cstring>

#include "base/dtype.h"

namespace nb::cuda {

void load_matrices(unsigned (&out)[4], const void* row, bool transposed, const emulation::Where& where) {
  const auto compute = [&](emulation::WarpData& data) {
    std::uint16_t numbers[4][8][8];
    for (int lane = 0; lane < 32; ++lane) {
      const void* address;
      std::memcpy(&address, data.in[lane], sizeof(address));
      emulation::on_read(address, 16, where);
      std::memcpy(numbers[lane / 8][lane % 8], address, 16);
    }
    for (int lane = 0; lane < 32; ++lane) {
      unsigned words[4];
      for (int m = 0; m < 4; ++m) {
        const int i = lane / 4, j = 2 * (lane % 4);
        const unsigned low = transposed ? numbers[m][j][i] : numbers[m][i][j];
        const unsigned high = transposed ? numbers[m][j + 1][i] : numbers[m][i][j + 1];
        words[m] = low | high << 16;
      }
      std::memcpy(data.out[lane], words, sizeof(words));
    }
  };
  emulation::collective(kFullWarp, "ldmatrix", &row, sizeof(row), out, sizeof(out), compute, where);
}

void multiply_matrices(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], bool are_bf16,
                       const emulation::Where& where) {
  struct Input {
    unsigned a[4], b[2];
    float d[4];
  };
  Input input;
  std::memcpy(input.a, a, sizeof(a));
  std::memcpy(input.b, b, sizeof(b));
  std::memcpy(input.d, d, sizeof(d));
  const auto compute = [&](emulation::WarpData& data) {
    Input lanes[32];
    for (int lane = 0; lane < 32; ++lane) std::memcpy(&lanes[lane], data.in[lane], sizeof(Input));
    const auto half = [&](unsigned word, int index) {
      const auto bits = static_cast<std::uint16_t>(index == 0 ? word : word >> 16);
      return static_cast<double>(are_bf16 ? bf16_to_f32(bits) : f16_to_f32(bits));
    };
    double left[16][16], right[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = 2 * (lane % 4);
      for (int i = 0; i < 2; ++i) {
        left[g][t + i] = half(lanes[lane].a[0], i);
        left[g + 8][t + i] = half(lanes[lane].a[1], i);
        left[g][t + 8 + i] = half(lanes[lane].a[2], i);
        left[g + 8][t + 8 + i] = half(lanes[lane].a[3], i);
        right[t + i][g] = half(lanes[lane].b[0], i);
        right[t + 8 + i][g] = half(lanes[lane].b[1], i);
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      float result[4];
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, col = 2 * (lane % 4) + i % 2;
        double sum = 0.0;
        for (int k = 0; k < 16; ++k) sum += left[row][k] * right[k][col];
        result[i] = static_cast<float>(static_cast<double>(lanes[lane].d[i]) + sum);
      }
      std::memcpy(data.out[lane], result, sizeof(result));
    }
  };
  emulation::collective(kFullWarp, "mma", &input, sizeof(input), d, sizeof(d), compute, where);
}

}  // namespace nb::cuda
