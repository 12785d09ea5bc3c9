#include "engine/outbox.h"

#include <utility>

#include "base/wait.h"

namespace nb::engine {

namespace {

std::uint64_t key_of(const StepOutput& output) {
  return static_cast<std::uint64_t>(output.request_id) * kMaxChoices + static_cast<std::uint64_t>(output.choice);
}

}  // namespace

void append(StepOutput& output, StepOutput&& later) {
  later.token_ids.insert(later.token_ids.begin(), output.token_ids.begin(), output.token_ids.end());
  later.logprobs.insert(later.logprobs.begin(), output.logprobs.begin(), output.logprobs.end());
  output = std::move(later);
}

std::vector<StepOutput> Outbox::wait(Seconds timeout) {
  std::unique_lock lock(mutex_);
  wait_at_most(changed_, lock, timeout,
               [&] { return closed_ || (wake_ == Wake::each_step ? !outputs_.empty() : num_ends_ > 0); });
  places_.clear();
  num_ends_ = 0;
  return std::exchange(outputs_, {});
}

bool Outbox::wait_for_ends(Seconds timeout) {
  std::unique_lock lock(mutex_);
  return wait_at_most(changed_, lock, timeout, [&] { return num_unfinished_ == 0; });
}

int Outbox::num_unfinished() const {
  const std::lock_guard lock(mutex_);
  return num_unfinished_;
}

void Outbox::close() {
  {
    const std::lock_guard lock(mutex_);
    closed_ = true;
  }
  changed_.notify_all();
}

bool Outbox::closed() const {
  const std::lock_guard lock(mutex_);
  return closed_;
}

void Outbox::expect(int num_answers) {
  const std::lock_guard lock(mutex_);
  num_unfinished_ += num_answers;
}

void Outbox::put(std::vector<StepOutput> outputs) {
  bool wakes = wake_ == Wake::each_step;
  {
    const std::lock_guard lock(mutex_);
    for (StepOutput& output : outputs) {
      const bool ends = output.finish_reason != FinishReason::none;
      const auto [place, is_new] = places_.try_emplace(key_of(output), outputs_.size());
      if (is_new) {
        outputs_.push_back(std::move(output));
      } else {
        append(outputs_[place->second], std::move(output));
      }
      if (!ends) continue;
      wakes = true;
      ++num_ends_;
      --num_unfinished_;
    }
  }
  if (wakes) changed_.notify_all();
}

}  // namespace nb::engine
