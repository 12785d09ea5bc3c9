#include "engine/load_queue.h"

#include <algorithm>
#include <exception>
#include <utility>

#include "base/error.h"
#include "base/log.h"
#include "base/wait.h"

namespace nb::engine {

LoadQueue::LoadQueue(kv::DiskStore& store, int num_threads, std::function<void()> wake)
    : store_(store), wake_(std::move(wake)) {
  NB_ASSERT(num_threads >= 1);
  for (int i = 0; i < num_threads; ++i) threads_.emplace_back([this] { run_reader(); });
}

LoadQueue::~LoadQueue() {
  {
    const std::lock_guard lock(mutex_);
    closing_ = true;
    tasks_.clear();
    for (const auto& [id, load] : loads_) load->stopped = true;
  }
  work_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

LoadId LoadQueue::add(std::vector<LoadPart> parts, kv::StoreMemory scratch) {
  NB_ASSERT(!parts.empty());
  const auto load = std::make_shared<Load>();
  load->num_left = load->first_failed = parts.size();
  load->parts = std::move(parts);
  load->scratch = std::move(scratch);
  {
    const std::lock_guard lock(mutex_);
    load->id = next_id_++;
    std::deque<Task> tasks = tasks_;
    for (std::size_t i = 0; i < load->parts.size(); ++i) tasks.push_back({load, i});
    loads_.emplace(load->id, load);
    tasks_.swap(tasks);
  }
  work_.notify_all();
  return load->id;
}

std::vector<ReadPart> LoadQueue::collect() {
  std::vector<ReadPart> read;
  {
    const std::lock_guard lock(mutex_);
    read.swap(read_);
    for (const ReadPart& part : read) own_bytes_ -= loads_.at(part.load)->parts[part.index].own_bytes;
  }
  if (!read.empty()) work_.notify_all();
  return read;
}

std::optional<std::size_t> LoadQueue::take(LoadId load) {
  const std::lock_guard lock(mutex_);
  const auto found = loads_.find(load);
  NB_ASSERT(found != loads_.end());
  if (found->second->num_left > 0) return std::nullopt;
  const auto is_its = [&](const ReadPart& part) { return part.load == load; };
  if (std::any_of(read_.begin(), read_.end(), is_its)) return std::nullopt;  // to be collected before
  const std::size_t num_read = found->second->first_failed;
  loads_.erase(found);
  return num_read;
}

void LoadQueue::stop(LoadId load) {
  std::unique_lock lock(mutex_);
  const auto found = loads_.find(load);
  NB_ASSERT(found != loads_.end());
  const std::shared_ptr<Load> stopped = found->second;
  stopped->stopped = true;
  std::erase_if(tasks_, [&](const Task& task) { return task.load == stopped; });
  changed_.wait(lock, [&] { return stopped->num_reading == 0; });
  for (const ReadPart& part : read_) {
    if (part.load == load) own_bytes_ -= stopped->parts[part.index].own_bytes;
  }
  std::erase_if(read_, [&](const ReadPart& part) { return part.load == load; });
  loads_.erase(load);
  lock.unlock();
  work_.notify_all();
}

void LoadQueue::wait(std::uint64_t seen, std::chrono::steady_clock::time_point until) {
  std::unique_lock lock(mutex_);
  const std::chrono::duration<double> left = until - std::chrono::steady_clock::now();
  wait_at_most(changed_, lock, left, [&] { return progress_ != seen; });
}

// ---- the readers ----

/// Whether the next part may be read now.
bool LoadQueue::may_start() const {
  if (tasks_.empty()) return false;
  const std::uint64_t bytes = tasks_.front().load->parts[tasks_.front().index].own_bytes;
  return bytes == 0 || own_bytes_ == 0 || own_bytes_ + bytes <= kMostOwnBytes;
}

void LoadQueue::run_reader() {
  std::unique_lock lock(mutex_);
  while (true) {
    work_.wait(lock, [&] { return closing_ || may_start(); });
    if (closing_) return;
    const Task task = std::move(tasks_.front());
    tasks_.pop_front();
    Load& load = *task.load;
    const LoadPart& part = load.parts[task.index];
    ++load.num_reading;
    own_bytes_ += part.own_bytes;
    const bool is_wanted = task.index < load.first_failed;
    lock.unlock();
    std::optional<kv::DiskRecord> record;
    const bool is_read = is_wanted && read(load, part, record);
    lock.lock();
    --load.num_reading;
    --load.num_left;
    if (!is_read) load.first_failed = std::min(load.first_failed, task.index);
    if (record && !load.stopped) {
      read_.push_back({.load = load.id, .index = task.index, .record = std::move(*record)});
    } else {
      own_bytes_ -= part.own_bytes;
    }
    const bool is_news = load.num_left == 0 || part.own_bytes > 0;
    if (is_news) ++progress_;
    changed_.notify_all();
    work_.notify_one();  // there may be room for another part
    if (!is_news || !wake_) continue;
    lock.unlock();
    wake_();
    lock.lock();
  }
}

/// Reads a part; what is wrong with it is counted by the store.
bool LoadQueue::read(Load& load, const LoadPart& part, std::optional<kv::DiskRecord>& record) noexcept {
  try {
    if (part.own_bytes == 0) return store_.load(part.key, part.tokens, part.memory, &load.stopped);
    record = store_.open(part.key, part.tokens, &load.stopped);
    return record.has_value();
  } catch (const std::exception& error) {
    log(LogLevel::warning, "the KV store: reading a record failed: ", error.what());
  }
  return false;
}

}  // namespace nb::engine
