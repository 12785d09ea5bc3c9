#include "model/layer_stream.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "base/error.h"
#include "io/blob_file.h"

namespace nb::model {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point begun) { return std::chrono::duration<double>(Clock::now() - begun).count(); }

}  // namespace

LayerStream::LayerStream(const std::vector<LayerWeights>& layers, Options options, Read read)
    : streamed_(std::move(options.streamed)),
      positions_(layers.size(), kNone),
      slot_bytes_(options.slot_bytes),
      direct_(options.direct),
      read_(std::move(read)),
      device_(options.memory) {
  const auto num_slots = static_cast<std::size_t>(options.num_slots);
  NB_ASSERT(!streamed_.empty() && num_slots >= std::min<std::size_t>(2, streamed_.size()));
  NB_ASSERT(slot_bytes_ > 0 && slot_bytes_ % io::kBlobAlignment == 0);
  for (std::size_t i = 0; i < streamed_.size(); ++i) {
    NB_ASSERT(i == 0 || streamed_[i] > streamed_[i - 1]);
    const auto layer = static_cast<std::size_t>(streamed_[i]);
    NB_ASSERT(static_cast<std::size_t>(blob_bytes(layers[layer])) <= slot_bytes_);
    positions_[layer] = static_cast<int>(i);
    placed_.push_back(layers[layer]);
  }
  take_memory(num_slots);
  reader_ = std::thread([this] { work(); });
}

void LayerStream::take_memory(std::size_t num_slots) {
  if (device_ != nullptr) {
    memory_ = allocate_on(*device_, num_slots * slot_bytes_);
  } else {
    const auto arena = HostArena::create(num_slots * slot_bytes_);
    memory_ = arena->allocate(num_slots * slot_bytes_, io::kBlobAlignment);
    memory_.data()[memory_.bytes() - 1] = std::byte{};  // so that its page is there, whose rest goes back
    arena->trim();
  }
  for (std::size_t i = 0; i < num_slots; ++i) {
    slots_.push_back({.data = memory_.data() + i * slot_bytes_});
    if (device_ == nullptr) continue;
    slots_.back().mark = {device_->new_mark(), [device = device_](void* mark) {
                            if (mark != nullptr) device->delete_mark(mark);
                          }};
    if (slots_.back().mark == nullptr) check(*device_);
    NB_CHECK(slots_.back().mark != nullptr, device, device_->name, " has no more marks");
  }
}

LayerStream::~LayerStream() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  wanted_.notify_one();
  reader_.join();
}

const LayerWeights& LayerStream::acquire(int layer) {
  const int position = positions_[static_cast<std::size_t>(layer)];
  NB_ASSERT(position != kNone);
  const Clock::time_point begun = Clock::now();
  std::unique_lock lock(mutex_);
  NB_ASSERT(in_use_ == kNone);
  next_ = position;
  error_ = nullptr;  // of a read that was ahead: it is tried again
  wanted_.notify_one();
  int slot = kNone;
  arrived_.wait(lock, [&] {
    if (error_ != nullptr && error_position_ != position) {
      error_ = nullptr;  // of a read that was under way for nobody
      wanted_.notify_one();
    }
    slot = find(position);
    return error_ != nullptr || (slot != kNone && slots_[static_cast<std::size_t>(slot)].state == State::ready);
  });
  stats_.wait_seconds += seconds_since(begun);
  if (error_ != nullptr) std::rethrow_exception(error_);  // it stays: nothing is read before somebody asks again
  in_use_ = slot;
  next_ = (position + 1) % static_cast<int>(streamed_.size());
  wanted_.notify_one();
  LayerWeights& weights = placed_[static_cast<std::size_t>(position)];
  place_blob(weights, slots_[static_cast<std::size_t>(slot)].data);
  return weights;
}

void LayerStream::release(int layer) {
  const int position = positions_[static_cast<std::size_t>(layer)];
  const std::lock_guard lock(mutex_);
  NB_CHECK(position != kNone && in_use_ != kNone && slots_[static_cast<std::size_t>(in_use_)].position == position,
           internal, "layer ", layer, " is released, which is not the acquired one");
  place_blob(placed_[static_cast<std::size_t>(position)], nullptr);
  if (device_ != nullptr) device_->set_mark(slots_[static_cast<std::size_t>(in_use_)].mark.get());
  in_use_ = kNone;
  wanted_.notify_one();
}

StreamStats LayerStream::stats() const {
  const std::lock_guard lock(mutex_);
  StreamStats stats = stats_;
  stats.layers = static_cast<int>(streamed_.size());
  stats.slots = static_cast<int>(slots_.size());
  stats.direct = direct_;
  return stats;
}

/// The slot that holds, or is about to hold, a position.
int LayerStream::find(int position) const {
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    if (slots_[i].state != State::empty && slots_[i].position == position) return static_cast<int>(i);
  }
  return kNone;
}

/// What to read next, and where: the first of the positions from next_ on that is in no slot, as many of them as there
/// are slots not in use, into the slot whose layer is wanted last. So where reading is the slower half, and slots are
/// rarely all ahead, the spare ones keep their layers from one cycle to the next. False if all are there.
bool LayerStream::choose(int& slot, int& position) const {
  const int num_streamed = static_cast<int>(streamed_.size());
  const int num_free = static_cast<int>(slots_.size()) - (in_use_ == kNone ? 0 : 1);
  const auto distance = [&](const Slot& of) {
    return of.state == State::empty ? num_streamed : (of.position - next_ + num_streamed) % num_streamed;
  };
  for (int ahead = 0; ahead < std::min(num_free, num_streamed); ++ahead) {
    position = (next_ + ahead) % num_streamed;
    if (find(position) != kNone) continue;
    slot = kNone;
    for (int i = 0; i < static_cast<int>(slots_.size()); ++i) {
      if (i == in_use_) continue;
      const auto at = [&](int index) { return distance(slots_[static_cast<std::size_t>(index)]); };
      if (slot == kNone || at(i) > at(slot)) slot = i;
    }
    return true;
  }
  return false;
}

void LayerStream::work() {
  std::unique_lock lock(mutex_);
  while (true) {
    int index = kNone, position = kNone;
    wanted_.wait(lock, [&] { return stopping_ || (error_ == nullptr && choose(index, position)); });
    if (stopping_) return;
    Slot& slot = slots_[static_cast<std::size_t>(index)];
    slot.position = position;
    slot.state = State::loading;
    const int layer = streamed_[static_cast<std::size_t>(position)];
    lock.unlock();
    if (device_ != nullptr) device_->wait_for(slot.mark.get());
    const Clock::time_point begun = Clock::now();
    std::exception_ptr error;
    try {
      read_(layer, {slot.data, slot_bytes_});
    } catch (...) {
      error = std::current_exception();
    }
    const double seconds = seconds_since(begun);
    lock.lock();
    slot.state = error == nullptr ? State::ready : State::empty;
    if (error == nullptr) {
      ++stats_.reads;
      stats_.read_bytes += blob_bytes(placed_[static_cast<std::size_t>(position)]);
      stats_.read_seconds += seconds;
    } else {
      ++stats_.errors;
      error_ = error;
      error_position_ = position;
    }
    arrived_.notify_one();
  }
}

}  // namespace nb::model
