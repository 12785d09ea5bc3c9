// Packs many matrices in one parallel phase: the whole of a model, or one group.
//
// Groups are added first, which reserves their memory, and packed by `run`. The work is cut where the memory's 2 MB
// pages begin, so that no two members of the team have the system clear the same page, and every member stays busy to
// the end of the file. Each reads into a piece of memory of its own, which it uses again. One thread adds and runs.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "ops/linear_weight.h"

namespace nb::ops {

inline constexpr int kPairRows = 32;                    ///< rows that are packed together: two strips
inline constexpr std::int64_t kDeviceVectorBytes = 16;  ///< of WeightLayout::vectors

class PackQueue {
 public:
  /// Called by the thread that runs, now and then: bytes of the file read so far, and in all.
  using Progress = std::function<void(std::int64_t done, std::int64_t total)>;

  explicit PackQueue(WeightLayout layout) : layout_(layout) {}

  /// As pack_linear, but what the memory holds is only there after `run`.
  LinearWeight add(std::span<const MatrixSource> group, Grouping grouping, const std::string& requested_act,
                   HostArena& arena);

  /// The same for what plan_linear() gave and zeroed memory of the caller's; places the weight there.
  void add(std::span<const MatrixSource> group, LinearWeight& weight, std::uint8_t* base);

  /// Packs what was added and empties the queue. Rethrows what reading throws, after which nothing is of use.
  void run(ThreadPool& pool, const Progress& progress = {});

 private:
  struct Matrix {
    MatrixSource source;
    LinearSegment segment;
    std::uint8_t* base;
  };

  // Pairs [begin, end) of one matrix, whose memory begins in one page of 2 MB.
  struct Piece {
    std::uintptr_t page;
    const Matrix* matrix;
    int begin, end;
  };

  struct Staging;
  std::vector<Piece> cut() const;
  void pack(const Piece& piece, Staging& staging) const;

  WeightLayout layout_;
  std::vector<Matrix> matrices_;
};

}  // namespace nb::ops
