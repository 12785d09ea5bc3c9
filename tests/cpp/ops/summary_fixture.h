// Groups of stored tokens, their summaries on a backend, and means in double of what the formats say is kept.
//
// For tests only.
#pragma once

#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "base/ids.h"
#include "kv/kv_storage.h"
#include "ops/naive_kv.h"
#include "ops/ops_fixture.h"

namespace nb::ops {

using quant::KvFormat;

inline constexpr int kTokens = 120, kHeads = 2, kPositions = 200;
inline constexpr int kTarget = 9;  // the block of summaries; tokens lie in blocks 8 to 1

/// A stored sequence of tokens at positions from 30 on, each key rotated to its own.
struct Stored {
  Stored(Bench& bench, KvFormat kv_format, int dim, float magnitude)
      : format(kv_format),
        head_dim(dim),
        table(make_rotations(dim, kPositions)),
        k(Matrix::random(kTokens, kHeads * dim, 1)),
        v(Matrix::random(kTokens, kHeads * dim, 2)),
        storage({kv_format, 2, kHeads, dim}, kTarget + 1) {
    for (float& value : table) value *= magnitude;
    // A mean of random numbers is small; what is common to all tokens is not.
    for (std::size_t i = 0; i < k.values.size(); ++i) {
      k.values[i] = 0.3f * k.values[i] + static_cast<float>(i % 7) - 3.0f;
      v.values[i] = 0.3f * v.values[i] + static_cast<float>(i % 5) - 2.0f;
    }
    for (int block = 0; block <= kTarget; ++block) storage.zero(block);
    std::vector<int32_t> positions, slots;
    for (int t = 0; t < kTokens; ++t) {
      positions.push_back(30 + t);
      slots.push_back((8 - t / 16) * kBlockTokens + t % 16);
    }
    Bench reference("reference");
    rope(k.view(), positions, rotations(), reference.ctx);
    kv_write(layer(), k.view(), v.view(), slots, bench.ctx);
  }

  RopeTable rotations() const { return {table.data(), head_dim, kPositions}; }
  KvLayer layer() const { return storage.layer(1); }

  std::vector<float> head_of(const Matrix& x, int token, int head) const {
    const auto at = x.values.begin() + token * x.num_cols + head * head_dim;
    return {at, at + head_dim};
  }

  // The mean of tokens [first, first + count): of keys as they were before rotation, rotated to `position`.
  Matrix mean(const Matrix& x, bool is_key, int first, int count, int position) const {
    Matrix out(1, kHeads * head_dim);
    const auto angle = [&](int p, int i) {
      const float* row = table.data() + p * head_dim;
      return std::pair{static_cast<double>(row[i]), static_cast<double>(row[head_dim / 2 + i])};
    };
    for (int head = 0; head < kHeads; ++head) {
      std::vector<double> sum(static_cast<std::size_t>(head_dim), 0.0);
      for (int t = first; t < first + count; ++t) {
        const std::vector<double> kept = naive_stored(format, is_key, head_of(x, t, head));
        for (int i = 0; i < head_dim; ++i) {
          double value = kept[static_cast<std::size_t>(i)];
          if (is_key) {  // the inverse of a matrix ((c, -s), (s, c))
            const int pair = i % (head_dim / 2);
            const auto [c, s] = angle(30 + t, pair);
            const double a = kept[static_cast<std::size_t>(pair)],
                         b = kept[static_cast<std::size_t>(pair + head_dim / 2)];
            value = i < head_dim / 2 ? (c * a + s * b) / (c * c + s * s) : (c * b - s * a) / (c * c + s * s);
          }
          sum[static_cast<std::size_t>(i)] += value / count;
        }
      }
      for (int i = 0; i < head_dim; ++i) {
        double value = sum[static_cast<std::size_t>(i)];
        if (is_key) {
          const int pair = i % (head_dim / 2);
          const auto [c, s] = angle(position, pair);
          const double a = sum[static_cast<std::size_t>(pair)], b = sum[static_cast<std::size_t>(pair + head_dim / 2)];
          value = i < head_dim / 2 ? c * a - s * b : s * a + c * b;
        }
        out.values[static_cast<std::size_t>(head * head_dim + i)] = static_cast<float>(value);
      }
    }
    return out;
  }

  KvFormat format;
  int head_dim;
  std::vector<float> table;
  Matrix k, v;
  kv::KvStorage storage;
  std::vector<int32_t> blocks = {kTarget, 8, 7, 6, 5, 4, 3, 2, 1};  // tokens from index 1 on
};

/// Groups at the beginning and the end of blocks and across them, of one token and of all.
inline const KvSummary kSummaries[] = {
    {.block_begin = 1, .first_key = 0, .num_tokens = 16, .position = 30, .slot = kTarget * 16 + 3, .slot_position = 40},
    {.block_begin = 2, .first_key = 5, .num_tokens = 40, .position = 51, .slot = kTarget * 16, .slot_position = 3},
    {.block_begin = 1,
     .first_key = 119,
     .num_tokens = 1,
     .position = 149,
     .slot = kTarget * 16 + 15,
     .slot_position = 149},
    {.block_begin = 1,
     .first_key = 0,
     .num_tokens = 120,
     .position = 30,
     .slot = kTarget * 16 + 8,
     .slot_position = 199},
};

/// Makes all summaries, and wants the values that rows see and the keys to be the means.
inline void expect_means_of_what_is_stored(Bench& bench, KvFormat format) {
  for (const auto& [dim, magnitude] : {std::pair{16, 1.0f}, {64, 1.3f}, {80, 1.0f}}) {
    Stored stored(bench, format, dim, magnitude);
    summarize_kv(stored.layer(), kSummaries, stored.blocks, stored.rotations(), bench.ctx);
    for (const KvSummary& summary : kSummaries) {
      const int first = 16 * (summary.block_begin - 1) + summary.first_key, token = summary.slot % 16;
      const std::string what = concat(quant::to_string(format), ", dim ", dim, ", ", summary.num_tokens, " tokens");
      // The value: who sees one key gets its value.
      const std::vector<int32_t> block = {kTarget}, positions = {token};
      const std::vector<AttentionRun> runs = {
          {.block_begin = 0, .num_keys = token + 1, .position_offset = 0, .first_key = token}};
      const std::vector<AttentionSegment> segments = {{0, 1, 0, 1}};
      Matrix q = Matrix::random(1, kHeads * dim, 9), value(1, kHeads * dim);
      attention(value.view(), q.view(), kHeads, 1.0f, 0, stored.rotations(), stored.layer(),
                {positions, segments, runs, block}, bench.ctx);
      // A mean may be rounded to a neighbour of the code that it has here.
      const double step = format == KvFormat::f32 ? 2e-6 : format == KvFormat::bf16 ? 8e-3 : 1.0 / 120;
      Matrix mean_value = stored.mean(stored.v, false, first, summary.num_tokens, 0);
      expect_close(value, mean_value, format == KvFormat::mixed ? 2.0 / 15 : step, what + ", value");
      // The key: as far as it is from one stored here.
      Matrix key = stored.mean(stored.k, true, first, summary.num_tokens, summary.slot_position), nothing = key;
      kv::KvStorage other({format, 1, kHeads, dim}, 1);
      other.zero(0);
      const std::vector<int32_t> slot = {summary.slot}, there = {0};
      kv_write(other.layer(0), key.view(), nothing.view(), there, bench.ctx);
      std::vector<float> distance(1);
      key_deviation(distance, stored.layer(), slot, other.layer(0), there, bench.ctx);
      double square = 0.0;
      for (const float x : key.values) square += static_cast<double>(x) * static_cast<double>(x);
      const double tolerance = format == KvFormat::mixed ? 1.0 / 120 : step;
      EXPECT_LE(std::sqrt(static_cast<double>(distance[0])), tolerance * std::sqrt(square)) << what << ", key";
    }
  }
}

}  // namespace nb::ops
