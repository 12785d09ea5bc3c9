#include "sampling/accept.h"

#include <algorithm>

namespace nb::sampling {

int count_accepted(std::span<const TokenId> drafts, std::span<const TokenId> drawn) {
  const std::size_t most = std::min(drafts.size(), drawn.size());
  const auto end = drafts.begin() + static_cast<std::ptrdiff_t>(most);
  return static_cast<int>(std::mismatch(drafts.begin(), end, drawn.begin()).first - drafts.begin());
}

}  // namespace nb::sampling
