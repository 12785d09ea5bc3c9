#include "engine/throughput.h"

namespace nb::engine {

void Throughput::record(const StepWork& work, Clock::time_point begun, Clock::time_point ended, bool has_more) {
  const Entry entry{.work = work, .seconds = milliseconds(ended - (busy_ ? busy_since_ : begun)) / 1e3};
  add(total_, entry);
  window_[next_] = entry;
  next_ = (next_ + 1) % kWindowSteps;
  busy_since_ = ended;
  busy_ = has_more;
}

Rates Throughput::recent() const {
  Entry sum;
  for (const Entry& entry : window_) add(sum, entry);  // entries not used yet add nothing
  return rates(sum);
}

void Throughput::add(Entry& sum, const Entry& entry) {
  sum.work.generated_tokens += entry.work.generated_tokens;
  sum.work.read_bytes += entry.work.read_bytes;
  sum.work.forward_seconds += entry.work.forward_seconds;
  sum.seconds += entry.seconds;
}

Rates Throughput::rates(const Entry& sum) {
  const auto per_second = [](double amount, double seconds) { return seconds > 0.0 ? amount / seconds : 0.0; };
  return {.tokens_per_s = per_second(static_cast<double>(sum.work.generated_tokens), sum.seconds),
          .read_gb_per_s = per_second(static_cast<double>(sum.work.read_bytes) / 1e9, sum.work.forward_seconds)};
}

}  // namespace nb::engine
