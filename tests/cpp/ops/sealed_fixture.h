// A sequence whose keys are sealed group by group: on a backend, and as softmax in double over what the format says.
//
// For tests only.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "base/ids.h"
#include "kv/kv_storage.h"
#include "ops/naive_kv.h"
#include "ops/naive_policy.h"
#include "ops/ops_fixture.h"

namespace nb::ops {

/// One sequence whose keys are stored before rotation, in blocks in reversed order, group by group in slices.
struct SealedSequence {
  SealedSequence(int heads, int kv_heads, int dim, int count)
      : num_heads(heads),
        num_kv_heads(kv_heads),
        head_dim(dim),
        k(Matrix::random(count, kv_heads * dim, 1)),
        v(Matrix::random(count, kv_heads * dim, 2)),
        q(Matrix::random(count, heads * dim, 3, 1.5f)),
        table(make_rotations(dim, 4 * count)) {
    // Dimensions and groups of very different sizes and means: a scale along another axis or of another group shows.
    for (std::int64_t t = 0; t < count; ++t) {
      for (std::int64_t i = 0; i < k.num_cols; ++i) {
        float& key = k.values[static_cast<std::size_t>(t * k.num_cols + i)];
        const float size = (i % 16 == 3 ? 4.0f : i % 5 == 0 ? 0.1f : 0.5f) * (t / 16 % 2 == 0 ? 1.0f : 0.5f);
        key = size * (key + (i % 7 == 2 ? 3.0f : 0.0f));
      }
    }
    positions.resize(static_cast<std::size_t>(count));
    std::iota(positions.begin(), positions.end(), 0);
  }

  int num_keys() const { return static_cast<int>(k.num_rows); }
  int num_blocks() const { return (num_keys() + kBlockTokens - 1) / kBlockTokens; }
  int block_of(int group) const { return num_blocks() - 1 - group; }

  // Rows in slices of `slice`; each with the cells and groups that an engine gives them: two cells that outlive a step,
  // and others that do not.
  Matrix attend(Bench& bench, int slice, int window = 0) {
    const kv::KvShape shape{quant::KvFormat::int4, 2, num_kv_heads, head_dim};
    kv::KvStorage storage(shape, num_blocks(), nullptr, 2);
    for (int block = 0; block < num_blocks(); ++block) storage.zero(block);
    const KvLayer layer = storage.layer(1);
    std::vector<int32_t> blocks;
    for (int g = 0; g < num_blocks(); ++g) blocks.push_back(block_of(g));
    Matrix out(num_keys(), num_heads * head_dim, -3.0f);
    int current = 0;
    for (int begin = 0; begin < num_keys(); begin += slice) {
      const int end = std::min(num_keys(), begin + slice), count = end - begin;
      std::vector<int32_t> slots, cells, groups;
      std::vector<SealItem> items;
      for (int t = begin; t < end; ++t) {
        const int group = t / 16;
        const bool continues = group == begin / 16 && begin % 16 != 0, stays = group == end / 16 && end % 16 != 0;
        slots.push_back(block_of(group) * 16 + t % 16);
        groups.push_back(group);
        cells.push_back(continues ? current : stays ? 1 - current : ~(group - begin / 16));
        if (t % 16 == 15) items.push_back({block_of(group), cells.back(), 16});
      }
      if (end % 16 != 0 && cells.back() >= 0) current = cells.back();
      std::vector<float> step_cells(static_cast<std::size_t>((count / 16 + 2) * 16 * num_kv_heads * head_dim), NAN);
      OpenKeys open = storage.open_layer(1);
      open.step_cells = step_cells.data();
      open.row_cells = cells.data();
      open.row_groups = groups.data();
      open.bias = bias.empty() ? nullptr : bias.data();
      const auto rows = [&](Matrix& m) {
        return Tensor(m.values.data() + begin * m.num_cols, DType::f32, {count, m.num_cols});
      };
      kv_write(layer, rows(k), rows(v), slots, bench.ctx, open);
      kv_seal(layer, open, items, bench.ctx);
      std::vector<AttentionSegment> segments = {{0, count, 0, 1}};
      if (!policies.empty()) segments[0].policy = 0;
      AttentionRun run{0, end, 0};
      const bool scattered = positions.back() >= num_keys();
      if (scattered) run.positions_begin = 0;
      attention(
          rows(out), rows(q), num_heads, scale(), window, {table.data(), head_dim, 4 * num_keys()}, layer,
          {.positions = std::span(positions).subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(count)),
           .segments = segments,
           .runs = std::span(&run, 1),
           .blocks = blocks,
           .key_positions = scattered ? std::span<const int32_t>(positions) : std::span<const int32_t>{},
           .policies = policies},
          bench.ctx, open);
    }
    return out;
  }

  void rotate(std::vector<double>& x, int position) const {
    const std::size_t half = static_cast<std::size_t>(head_dim / 2);
    for (std::size_t i = 0; i < half; ++i) {
      const auto at = static_cast<std::size_t>(position * head_dim);
      const double cos = static_cast<double>(table[at + i]), sin = static_cast<double>(table[at + half + i]);
      const double a = x[i], b = x[i + half];
      x[i] = a * cos - b * sin;
      x[i + half] = b * cos + a * sin;
    }
  }

  std::vector<float> head_of(const Matrix& m, int token, int head) const {
    const auto first = m.values.begin() + token * m.num_cols + head * head_dim;
    return {first, first + head_dim};
  }

  // `exact`: as if nothing were quantized but values.
  Matrix expected(bool exact = false) const {
    Matrix out(num_keys(), num_heads * head_dim);
    for (int h = 0; h < num_heads; ++h) {
      const int kv_head = h / (num_heads / num_kv_heads);
      std::vector<std::vector<double>> open, sealed, values;
      for (int first = 0; first < num_keys(); first += 16) {
        std::vector<std::vector<float>> group;
        for (int t = first; t < std::min(first + 16, num_keys()); ++t) group.push_back(head_of(k, t, kv_head));
        for (auto& key : naive_sealed(group)) sealed.push_back(key);
        for (const auto& key : group) open.emplace_back(key.begin(), key.end());
      }
      for (int t = 0; t < num_keys(); ++t) {
        const auto at = static_cast<std::size_t>(t);
        for (auto* key : {&open[at], &sealed[at]}) {
          for (std::size_t d = 0; d < key->size() && !bias.empty(); ++d) {
            (*key)[d] += static_cast<double>(bias[static_cast<std::size_t>(kv_head * head_dim) + d]);
          }
          rotate(*key, positions[at]);
        }
        values.push_back(naive_stored(quant::KvFormat::int4, false, head_of(v, t, kv_head)));
      }
      for (int row = 0; row < num_keys(); ++row) {
        const std::vector<float> own = head_of(q, row, h);
        std::vector<double> query(own.begin(), own.end()), scores;
        rotate(query, positions[static_cast<std::size_t>(row)]);
        const NaiveRow shown(policies.empty() ? KeyPolicy{} : policies[0], row);
        for (int t = 0; t <= row; ++t) {
          const auto& key =
              exact || t / 16 == row / 16 ? open[static_cast<std::size_t>(t)] : sealed[static_cast<std::size_t>(t)];
          scores.push_back(std::inner_product(query.begin(), query.end(), key.begin(), 0.0) *
                           static_cast<double>(scale()));
          if (!shown.shows(t)) scores.back() = -std::numeric_limits<double>::infinity();
        }
        const std::vector<double> mean = naive_attended(scores, values);
        for (std::size_t d = 0; d < mean.size(); ++d) {
          out.values[static_cast<std::size_t>(row * out.num_cols + h * head_dim) + d] = static_cast<float>(mean[d]);
        }
      }
    }
    return out;
  }

  float scale() const { return 1.0f / std::sqrt(static_cast<float>(head_dim)); }

  int num_heads, num_kv_heads, head_dim;
  Matrix k, v, q;
  std::vector<float> table, bias;
  std::vector<int32_t> positions;
  std::vector<KeyPolicy> policies;  // none or one
};

}  // namespace nb::ops
