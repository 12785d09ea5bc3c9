// Lists of named things: their order by name, and search in that order.
//
// Sorted indices take logarithmic time whatever names a file invents; a hash table could be aimed at. Pure functions.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <string_view>
#include <vector>

namespace nb::io {

/// Fills `order` with the indices 0..n-1 in order of names; gives -1, or the index of a name that occurs twice.
template <class Items, class NameOf>
std::int64_t sort_by_name(const Items& items, const NameOf& name_of, std::vector<std::uint32_t>& order) {
  order.resize(items.size());
  std::iota(order.begin(), order.end(), 0u);
  std::sort(order.begin(), order.end(), [&](std::uint32_t a, std::uint32_t b) {
    const int sign = name_of(items[a]).compare(name_of(items[b]));
    return sign != 0 ? sign < 0 : a < b;
  });
  for (std::size_t i = 1; i < order.size(); ++i) {
    if (name_of(items[order[i - 1]]) == name_of(items[order[i]])) return order[i];
  }
  return -1;
}

/// The item called `name`, or null; `order` as sort_by_name made it.
template <class Items, class NameOf>
auto find_by_name(const Items& items, const NameOf& name_of, const std::vector<std::uint32_t>& order,
                  std::string_view name) -> decltype(items.data()) {
  const auto place = std::lower_bound(order.begin(), order.end(), name, [&](std::uint32_t index, std::string_view key) {
    return name_of(items[index]) < key;
  });
  return place != order.end() && name_of(items[*place]) == name ? &items[*place] : nullptr;
}

}  // namespace nb::io
