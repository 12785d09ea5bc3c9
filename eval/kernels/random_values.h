// Numbers to compute with, the same in every run. For benchmarks only.
#pragma once

#include <cstddef>
#include <random>
#include <vector>

inline std::vector<float> random_values(std::size_t count) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) value = normal(random);
  return values;
}
