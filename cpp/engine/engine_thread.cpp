#include "engine/engine_thread.h"

#include <algorithm>
#include <exception>
#include <new>
#include <utility>

#include "base/error.h"
#include "base/log.h"
#include "base/wait.h"

namespace nb::engine {

namespace {

/// A step that fails ends the requests that ran, and the next one starts others; when so many fail in a row, it is not
/// the requests.
constexpr int kMostFailures = 8;

/// What can be kept only when the store has written more is tried again so often.
constexpr std::chrono::milliseconds kSavePause{10};

/// How long closing waits for what is to be kept.
constexpr std::chrono::seconds kSaveAtEnd{10};

}  // namespace

EngineThread::EngineThread(const model::Model& model, const EngineOptions& options)
    : engine_(model, options, [this] { wake(); }),
      stats_(engine_.stats()),
      thread_([this] { work(); }),
      thread_id_(thread_.get_id()) {}

RequestId EngineThread::submit(Request request, std::shared_ptr<Outbox> outbox) {
  Arrival arrival{.id = 0, .answers = engine_.prepare(std::move(request))};
  const int num_answers = static_cast<int>(arrival.answers.size());
  const EngineOptions& limits = options();
  RequestId id = 0;
  {
    const std::lock_guard lock(mutex_);
    NB_CHECK(!closed_, invalid_argument, "the engine is closed");
    if (broken_) throw *broken_;
    NB_CHECK(!draining_, overloaded, "the engine is shutting down and takes no more requests");
    NB_CHECK(limits.max_waiting == 0 || num_unfinished_ + num_answers <= limits.max_num_seqs + limits.max_waiting,
             overloaded, num_unfinished_, " requests run or wait; max_num_seqs is ", limits.max_num_seqs,
             ", max_waiting ", limits.max_waiting,
             num_answers > 1 ? concat(", and ", num_answers, " answers are wanted") : "");
    id = next_id_;
    arrival.id = id;
    inbox_.push_back(std::move(arrival));
    Owner& owner = owners_.emplace(id, Owner{.outbox = outbox, .choices = {}}).first->second;
    for (int choice = 0; choice < num_answers; ++choice) owner.choices.push_back(choice);
    ++next_id_;
    num_unfinished_ += num_answers;
    outbox->expect(num_answers);
  }
  arrived_.notify_one();
  return id;
}

void EngineThread::cancel(RequestId id) {
  {
    const std::lock_guard lock(mutex_);
    cancelled_.push_back(id);
  }
  arrived_.notify_one();
}

void EngineThread::cancel_all(const Outbox& outbox) {
  {
    const std::lock_guard lock(mutex_);
    for (const auto& [id, owner] : owners_) {
      if (owner.outbox.get() == &outbox) cancelled_.push_back(id);
    }
  }
  arrived_.notify_one();
}

void EngineThread::hold() {
  const std::lock_guard lock(mutex_);
  ++num_holds_;
}

void EngineThread::release() {
  {
    const std::lock_guard lock(mutex_);
    --num_holds_;
  }
  arrived_.notify_one();
}

void EngineThread::call(std::function<void(Engine&)> what) {
  if (is_this_thread()) return what(engine_);
  std::future<void> done;
  {
    const std::lock_guard lock(mutex_);
    NB_CHECK(!closed_, invalid_argument, "the engine is closed");
    if (broken_) throw *broken_;
    // Who has called finds what that changed in the counters.
    const auto counted = [this, what = std::move(what)](Engine& engine) {
      what(engine);
      const std::lock_guard own_lock(mutex_);
      stats_ = engine.stats();
    };
    done = calls_.emplace_back(counted).get_future();
  }
  arrived_.notify_one();
  try {
    done.get();
  } catch (const std::future_error&) {
    throw Error(ErrorCode::invalid_argument, "the engine was closed");
  }
}

EngineStats EngineThread::stats() const {
  const std::lock_guard lock(mutex_);
  EngineStats stats = stats_;
  engine_.update_store_stats(stats);
  for (const Arrival& arrival : inbox_) stats.waiting += static_cast<int>(arrival.answers.size());
  return stats;
}

bool EngineThread::drain(Outbox::Seconds timeout) {
  std::unique_lock lock(mutex_);
  draining_ = true;
  return wait_at_most(ended_, lock, timeout, [&] { return num_unfinished_ == 0; });
}

void EngineThread::close() {
  {
    const std::lock_guard lock(mutex_);
    closed_ = true;
    for (const auto& [id, owner] : owners_) cancelled_.push_back(id);
  }
  arrived_.notify_one();
  if (is_this_thread()) return;
  const std::lock_guard lock(join_);
  if (thread_.joinable()) thread_.join();
}

/// For the threads that load: who waits looks again.
void EngineThread::wake() {
  { const std::lock_guard lock(mutex_); }
  arrived_.notify_one();
}

// ---- the thread ----

void EngineThread::work() {
  while (take_inbox()) {
    try {
      for (Arrival& arrival : arrivals_) engine_.submit(arrival.id, std::move(arrival.answers));
      for (const RequestId id : cancels_) engine_.cancel(id);
      for (auto& task : called_) task(engine_);
      arrivals_.clear();
      cancels_.clear();
      called_.clear();
      deliver(step());
    } catch (const Error& error) {
      give_up(error);
    } catch (const std::exception& error) {
      give_up(Error(ErrorCode::internal, error.what()));
    }
  }
  engine_.finish_saving(kSaveAtEnd);
  engine_.end_trace();
}

/// Takes what has arrived, or waits for it if there is nothing else to do. False when it is time to end.
bool EngineThread::take_inbox() {
  std::unique_lock lock(mutex_);
  const auto is_ready = [&] {
    const bool arrived = (!inbox_.empty() && num_holds_ == 0) || !cancelled_.empty() || !calls_.empty();
    return closed_ || (!broken_ && (arrived || (engine_.has_work() && !engine_.waits_for_load())));
  };
  while (!is_ready()) {
    lock.unlock();
    const bool goes_on = engine_.save_next() || engine_.touch_memory_ahead();
    const bool saves = engine_.has_saves();  // later, when the store has less to write
    lock.lock();
    if (goes_on) continue;
    if (saves) {
      arrived_.wait_for(lock, kSavePause, is_ready);
    } else if (engine_.waits_for_load()) {
      const Outbox::Seconds left = engine_.wait_deadline() - Clock::now();
      wait_at_most(arrived_, lock, left, is_ready);
    } else {
      arrived_.wait(lock, is_ready);
    }
  }
  if (closed_ && num_unfinished_ == 0) {
    calls_.clear();  // those who wait are told
    return false;
  }
  // What is cancelled or closed may be among what is held.
  if (num_holds_ == 0 || closed_ || !cancelled_.empty()) std::swap(arrivals_, inbox_);
  std::swap(cancels_, cancelled_);
  std::swap(called_, calls_);
  return true;
}

/// A step; if it fails, nothing: the next one says of every running request why it ended.
std::vector<StepOutput> EngineThread::step() {
  if (!engine_.has_work()) return {};  // only cancellations of what has ended
  try {
    std::vector<StepOutput> outputs = engine_.step_at_once();
    num_failures_ = 0;
    return outputs;
  } catch (const std::exception& error) {
    log(LogLevel::error, "a step failed: ", error.what());
    if (++num_failures_ == kMostFailures) throw;
    return {};
  }
}

/// Sorts outputs into the outboxes, each of which wakes its reader once. Counters come first, so that who has seen the
/// end of a request finds it in them.
void EngineThread::deliver(std::vector<StepOutput> outputs) {
  std::vector<std::pair<std::shared_ptr<Outbox>, std::vector<StepOutput>>> parcels;
  bool idle = false;
  {
    const std::lock_guard lock(mutex_);
    stats_ = engine_.stats();
    for (StepOutput& output : outputs) {
      const auto found = owners_.find(output.request_id);
      NB_ASSERT(found != owners_.end());
      Owner& owner = found->second;
      const auto same = [&](const auto& parcel) { return parcel.first == owner.outbox; };
      auto parcel = std::find_if(parcels.begin(), parcels.end(), same);
      if (parcel == parcels.end()) parcel = parcels.insert(parcel, {owner.outbox, {}});
      const bool ends = output.finish_reason != FinishReason::none;
      parcel->second.push_back(std::move(output));
      if (!ends) continue;
      --num_unfinished_;
      std::erase(owner.choices, parcel->second.back().choice);
      if (owner.choices.empty()) owners_.erase(found);
    }
    idle = num_unfinished_ == 0;
  }
  for (auto& [outbox, parcel] : parcels) outbox->put(std::move(parcel));
  if (idle) ended_.notify_all();
}

/// The engine cannot go on: everything ends with the reason, and nothing new is taken.
void EngineThread::give_up(const Error& error) {
  log(LogLevel::error, "the engine stops: ", error.what());
  std::map<RequestId, Owner> owners;
  {
    const std::lock_guard lock(mutex_);
    broken_.emplace(error);
    owners.swap(owners_);
    inbox_.clear();
    calls_.clear();
    num_unfinished_ = 0;
  }
  for (const auto& [id, owner] : owners) {
    std::vector<StepOutput> outputs;
    for (const int choice : owner.choices) {
      StepOutput& output = outputs.emplace_back();
      output.request_id = id;
      output.choice = choice;
      output.finish_reason = FinishReason::abort;
      output.error = error.what();
      output.error_code = error.code();
    }
    owner.outbox->put(std::move(outputs));
  }
  ended_.notify_all();
}

}  // namespace nb::engine
