// Layers that do not stay in memory: a reader thread brings their blobs into staging slots ahead of the computation.
//
// A step uses layers in ascending order and the next step begins again, so the reader goes round: the layers behind the
// one in use are read into the slots that are free, across the end of a step. Any other order is right too, and slower.
// Whoever computes is one thread, which has one layer acquired at a time; stats() is for any thread. On a device the
// slots lie in its memory, and a slot is filled again when the kernels are done that were started with its layer.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <thread>
#include <vector>

#include "model/layer_weights.h"
#include "tensor/allocator.h"
#include "tensor/device_memory.h"

namespace nb::model {

/// What a stream has done since it was made, and the memory of all weights.
struct StreamStats {
  int layers = 0;                   ///< that are streamed
  int slots = 0;                    ///< that they are read into
  bool direct = false;              ///< reads go past the page cache; on a device: come from pinned memory
  std::int64_t reads = 0;           ///< layers read
  std::int64_t read_bytes = 0;      ///< that they had
  double read_seconds = 0.0;        ///< that reading took the reader
  double wait_seconds = 0.0;        ///< that acquire() waited
  std::int64_t errors = 0;          ///< reads that failed
  std::int64_t budget_bytes = 0;    ///< that the memory of all weights was given; 0: no limit, and then the next is 0
  std::int64_t resident_bytes = 0;  ///< that it takes, slots included

  /// 10^9 bytes per second of reading.
  double gb_per_s() const { return read_seconds > 0.0 ? static_cast<double>(read_bytes) / read_seconds / 1e9 : 0.0; }
};

class LayerStream {
 public:
  /// Reads the blob of a layer into aligned memory (io/blob_file.h) of the size of a slot; called by the reader.
  using Read = std::function<void(int layer, std::span<std::byte> out)>;

  struct Options {
    std::vector<int> streamed{};           ///< layers, ascending, at least one
    int num_slots = 2;                     ///< one if one layer is streamed, else at least two
    std::size_t slot_bytes = 0;            ///< a multiple of io::kBlobAlignment
    bool direct = false;                   ///< for stats()
    const DeviceMemory* memory = nullptr;  ///< of the slots; null: the host's
  };

  /// `layers`: all of the model's. Takes the memory of the slots. Throws out_of_memory, device.
  LayerStream(const std::vector<LayerWeights>& layers, Options options, Read read);
  /// Waits for a read in progress.
  ~LayerStream();
  LayerStream(const LayerStream&) = delete;
  LayerStream& operator=(const LayerStream&) = delete;

  bool has(int layer) const { return positions_[static_cast<std::size_t>(layer)] >= 0; }

  /// Waits until the layer is in a slot. Throws what reading it threw; the next call tries again. Throws internal if a
  /// layer is acquired already.
  const LayerWeights& acquire(int layer);
  /// Throws internal unless the layer is the acquired one.
  void release(int layer);

  /// Without the memory.
  StreamStats stats() const;

 private:
  enum class State { empty, loading, ready };

  struct Slot {
    std::byte* data;
    int position = -1;  // of the layer in streamed_, unless empty
    State state = State::empty;
    std::shared_ptr<void> mark{};  // on a device: of the work that was begun with its last layer
  };

  static constexpr int kNone = -1;

  void take_memory(std::size_t num_slots);
  void work();
  bool choose(int& slot, int& position) const;
  int find(int position) const;

  std::vector<int> streamed_;
  std::vector<int> positions_;        // of each layer in streamed_; kNone: resident
  std::vector<LayerWeights> placed_;  // by position
  std::size_t slot_bytes_;
  bool direct_;
  Read read_;
  const DeviceMemory* device_;  // whose memory the slots are; null: the host's
  Buffer memory_;

  mutable std::mutex mutex_;
  std::condition_variable wanted_, arrived_;
  std::vector<Slot> slots_;
  int next_ = 0;              // position that is expected to be acquired next
  int in_use_ = kNone;        // slot of the acquired layer
  std::exception_ptr error_;  // of the last read; the reader waits until somebody asks again
  int error_position_ = kNone;
  StreamStats stats_;
  bool stopping_ = false;
  std::thread reader_;
};

}  // namespace nb::model
