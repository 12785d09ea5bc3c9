#include "model/stream_plan.h"

#include <algorithm>
#include <numeric>

#include "base/error.h"

namespace nb::model {
namespace {

constexpr int kMostPrefetch = 64;

StreamPlan plan_of(std::vector<int> streamed, int prefetch_layers, std::int64_t fixed_bytes,
                   std::span<const std::int64_t> layer_bytes) {
  StreamPlan plan;
  plan.streamed = std::move(streamed);
  plan.total_bytes = fixed_bytes + std::accumulate(layer_bytes.begin(), layer_bytes.end(), std::int64_t{0});
  for (const int layer : plan.streamed) {
    const std::int64_t bytes = layer_bytes[static_cast<std::size_t>(layer)];
    plan.slot_bytes = std::max(plan.slot_bytes, bytes);
    plan.total_bytes -= bytes;
  }
  plan.num_slots = std::min(prefetch_layers + 1, static_cast<int>(plan.streamed.size()));
  plan.total_bytes += plan.num_slots * plan.slot_bytes;
  return plan;
}

}  // namespace

StreamPlan plan_streaming(const StreamingOptions& options, std::int64_t fixed_bytes,
                          std::span<const std::int64_t> layer_bytes) {
  const int num_layers = static_cast<int>(layer_bytes.size());
  NB_CHECK(options.budget_bytes >= 0, invalid_argument,
           "streaming_config.budget_bytes must be >= 1, or 0 for the least "
           "that is possible, got ",
           options.budget_bytes);
  NB_CHECK(options.cache_bytes >= 0, invalid_argument,
           "streaming_config.cache_bytes must be >= 1, or 0 for no limit, got ", options.cache_bytes);
  NB_CHECK(options.keep_first_k >= 0 && options.keep_first_k <= num_layers, invalid_argument,
           "streaming_config.keep_first_k must be in [0, ", num_layers, "], the model's layers, got ",
           options.keep_first_k);
  NB_CHECK(options.keep_last_k >= 0 && options.keep_last_k <= num_layers, invalid_argument,
           "streaming_config.keep_last_k must be in [0, ", num_layers, "], the model's layers, got ",
           options.keep_last_k);
  NB_CHECK(options.prefetch_layers >= 1 && options.prefetch_layers <= kMostPrefetch, invalid_argument,
           "streaming_config.prefetch_layers must be in [1, ", kMostPrefetch, "], got ", options.prefetch_layers);
  std::vector<int> free;  // those that need not stay
  for (int i = options.keep_first_k; i < num_layers - options.keep_last_k; ++i) free.push_back(i);
  const auto plan = [&](std::vector<int> streamed) {
    return plan_of(std::move(streamed), options.prefetch_layers, fixed_bytes, layer_bytes);
  };
  const StreamPlan least = plan(free);
  if (options.budget_bytes == 0) return least;
  const std::int64_t slots_bytes = least.num_slots * least.slot_bytes;
  NB_CHECK(least.total_bytes <= options.budget_bytes, invalid_argument, "streaming_config.budget_bytes is ",
           options.budget_bytes, ", but ", least.total_bytes, " are needed: ", fixed_bytes,
           " for embeddings, head, norms and column orders, ", least.total_bytes - fixed_bytes - slots_bytes, " for ",
           num_layers - static_cast<int>(free.size()), " kept layers, ", slots_bytes, " for ", least.num_slots,
           " slots of ", least.slot_bytes, " (prefetch_layers + 1)");
  const int num_free = static_cast<int>(free.size());
  for (int count = 0; count < num_free; ++count) {
    std::vector<int> streamed;
    for (int i = 0; i < count; ++i) {
      streamed.push_back(free[static_cast<std::size_t>((2 * i + 1) * num_free / (2 * count))]);
    }
    StreamPlan some = plan(std::move(streamed));
    if (some.total_bytes <= options.budget_bytes) return some;
  }
  return least;
}

}  // namespace nb::model
