// Sequences whose rows see their keys by policies: on a backend, and as softmax in double over what the rules show.
//
// For tests only.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "base/ids.h"
#include "kv/kv_storage.h"
#include "ops/naive_kv.h"
#include "ops/naive_policy.h"
#include "ops/ops_fixture.h"

namespace nb::ops {

/// What a block that no row of a segment sees is replaced by.
enum class Dead { kept, replaced };

struct PolicyProblem {
  struct Sequence {
    int keys, rows;         // the last `rows` keys are those of the rows
    int policy = -1;        // of `policies`
    int shared_blocks = 0;  // leading blocks are those of the sequence before
  };
  int num_heads, num_kv_heads, head_dim;
  quant::KvFormat format;
  int window;
  std::vector<KeyPolicy> policies;
  std::vector<Sequence> sequences;

  // Before rotation. Leading blocks are shared in a chain.
  Matrix keys_of(std::size_t s) const { return rows_of(s, 100); }
  Matrix values_of(std::size_t s) const { return rows_of(s, 200); }
  Matrix queries() const {
    std::int64_t rows = 0;
    for (const Sequence& sequence : sequences) rows += sequence.rows;
    return Matrix::random(rows, num_heads * head_dim, 3, 1.5f);
  }
  float scale() const { return 1.0f / std::sqrt(static_cast<float>(head_dim)); }

  // The keys that a row sees.
  std::vector<int> shown_keys(const Sequence& sequence, int row) const {
    const KeyPolicy none;
    const NaiveRow naive(sequence.policy < 0 ? none : policies[static_cast<std::size_t>(sequence.policy)], row);
    std::vector<int> shown;
    for (int key = window > 0 ? std::max(0, row - window + 1) : 0; key <= row; ++key) {
      if (naive.shows(key)) shown.push_back(key);
    }
    return shown;
  }

  // For each block of the sequence whether no row of it sees any key there because of its policy.
  std::vector<bool> dead_blocks(const Sequence& sequence) const {
    std::vector<bool> dead(static_cast<std::size_t>((sequence.keys + 15) / 16), sequence.policy >= 0);
    if (sequence.policy < 0) return dead;
    for (int row = sequence.keys - sequence.rows; row < sequence.keys; ++row) {
      const NaiveRow naive(policies[static_cast<std::size_t>(sequence.policy)], row);
      for (int key = 0; key < sequence.keys; ++key) {
        if (key > row || naive.shows(key)) dead[static_cast<std::size_t>(key / 16)] = false;
      }
    }
    return dead;
  }

  // With `grouped` the sequences say what they share. Alone, row `only_row` has a plan of its own.
  Matrix attend(Bench& bench, const std::vector<float>& cos_sin, Dead replaced, bool grouped = true,
                int only_row = -1) const {
    const RopeTable rope_table{cos_sin.data(), head_dim, static_cast<int32_t>(cos_sin.size()) / head_dim};
    int total_blocks = 2;
    for (const Sequence& sequence : sequences) total_blocks += (sequence.keys + 15) / 16;
    kv::KvStorage storage({format, 2, num_kv_heads, head_dim}, total_blocks);
    for (int block = 0; block < total_blocks; ++block) storage.zero(block);
    const KvLayer layer = storage.layer(1);
    // In the place of dead blocks: one with content that would show, and one that may not be read at all.
    const int32_t other = 0, unread = 1;
    for (const auto& [block, key, value] :
         {std::tuple{other, 30.0f, 1e3f},
          {unread, std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::quiet_NaN()}}) {
      Matrix k(16, num_kv_heads * head_dim, key), v(16, num_kv_heads * head_dim, value);
      std::vector<int32_t> slots(16);
      std::iota(slots.begin(), slots.end(), 16 * block);
      kv_write(layer, k.view(), v.view(), slots, bench.ctx);
    }
    std::vector<int32_t> free_blocks(static_cast<std::size_t>(total_blocks - 2));
    std::iota(free_blocks.begin(), free_blocks.end(), 2);
    std::mt19937 random(4);
    std::shuffle(free_blocks.begin(), free_blocks.end(), random);

    std::vector<int32_t> positions, blocks, before;
    std::vector<AttentionSegment> segments;
    std::vector<AttentionRun> runs;
    for (std::size_t s = 0; s < sequences.size(); ++s) {
      const Sequence& sequence = sequences[s];
      std::vector<int32_t> own(before.begin(), before.begin() + sequence.shared_blocks), slots, places;
      for (int t = 0; t < sequence.keys; ++t) {
        if (t / 16 == static_cast<int>(own.size())) {
          own.push_back(free_blocks.back());
          free_blocks.pop_back();
        }
        slots.push_back(own[static_cast<std::size_t>(t / 16)] * kBlockTokens + t % 16);
        places.push_back(t);
      }
      Matrix k = keys_of(s), v = values_of(s);
      Bench reference("reference");
      rope(k.view(), places, rope_table, reference.ctx);
      kv_write(layer, k.view(), v.view(), slots, bench.ctx);
      before = own;
      int shared = s == 0 ? 0 : sequence.shared_blocks;
      if (replaced == Dead::replaced) {
        const std::vector<bool> dead = dead_blocks(sequence);
        const int count = static_cast<int>(dead.size());
        for (int b = 0; b < count; ++b) {
          if (!dead[static_cast<std::size_t>(b)]) continue;
          bool whole_tile = true;
          for (int i = b / 4 * 4; i < std::min(count, b / 4 * 4 + 4); ++i) {
            whole_tile = whole_tile && dead[static_cast<std::size_t>(i)];
          }
          own[static_cast<std::size_t>(b)] = whole_tile ? unread : other;
        }
        const auto* last_run = runs.empty() ? nullptr : &runs.back();
        int equal = 0;
        while (last_run != nullptr && equal < shared &&
               own[static_cast<std::size_t>(equal)] ==
                   blocks[static_cast<std::size_t>(last_run->block_begin + equal)]) {
          ++equal;
        }
        shared = equal;
      }
      segments.push_back({.row_begin = static_cast<int32_t>(positions.size()),
                          .row_count = sequence.rows,
                          .run_begin = static_cast<int32_t>(runs.size()),
                          .run_count = 1,
                          .shared_keys = grouped ? shared * kBlockTokens : 0,
                          .policy = sequence.policy});
      runs.push_back({static_cast<int32_t>(blocks.size()), sequence.keys, 0});
      blocks.insert(blocks.end(), own.begin(), own.end());
      for (int p = sequence.keys - sequence.rows; p < sequence.keys; ++p) positions.push_back(p);
    }
    Matrix q = queries();
    if (only_row >= 0) {
      const auto at = std::find_if(segments.begin(), segments.end(), [&](const AttentionSegment& segment) {
        return only_row >= segment.row_begin && only_row < segment.row_begin + segment.row_count;
      });
      AttentionSegment segment = *at;
      segment.row_begin = 0, segment.row_count = 1, segment.shared_keys = 0;
      segments = {segment};
      positions = {positions[static_cast<std::size_t>(only_row)]};
      Matrix one(1, q.num_cols);
      std::copy_n(q.values.begin() + only_row * q.num_cols, q.num_cols, one.values.begin());
      q = one;
    }
    Matrix out(q.num_rows, q.num_cols, -3.0f);
    attention(out.view(), q.view(), num_heads, scale(), window, rope_table, layer,
              {positions, segments, runs, blocks, {}, {}, policies}, bench.ctx);
    return out;
  }

  // Softmax in double over the keys that the rules show, as the format stores them.
  Matrix expected(const std::vector<float>& cos_sin) const {
    const RopeTable rope_table{cos_sin.data(), head_dim, static_cast<int32_t>(cos_sin.size()) / head_dim};
    Bench reference("reference");
    Matrix q = queries(), out(q.num_rows, q.num_cols);
    std::int64_t row = 0;
    for (std::size_t s = 0; s < sequences.size(); ++s) {
      const Sequence& sequence = sequences[s];
      std::vector<int32_t> places(static_cast<std::size_t>(sequence.keys));
      std::iota(places.begin(), places.end(), 0);
      Matrix k = keys_of(s), v = values_of(s);
      rope(k.view(), places, rope_table, reference.ctx);
      const auto stored = [&](const Matrix& x, bool is_key) {
        std::vector<std::vector<double>> kept;
        for (auto at = x.values.begin(); at != x.values.end(); at += head_dim) {
          kept.push_back(naive_stored(format, is_key, std::vector<float>(at, at + head_dim)));
        }
        return kept;
      };
      const auto keys = stored(k, true), values = stored(v, false);
      for (int p = sequence.keys - sequence.rows; p < sequence.keys; ++p, ++row) {
        Matrix query(1, q.num_cols);
        std::copy_n(q.values.begin() + row * q.num_cols, q.num_cols, query.values.begin());
        const std::vector<int32_t> at = {p};
        rope(query.view(), at, rope_table, reference.ctx);
        const std::vector<int> shown = shown_keys(sequence, p);
        for (int h = 0; h < num_heads; ++h) {
          const int kv_head = h / (num_heads / num_kv_heads);
          std::vector<double> sums(static_cast<std::size_t>(head_dim), 0.0);
          double total = 0.0;
          for (const int key : shown) {
            const auto cell = static_cast<std::size_t>(key * num_kv_heads + kv_head);
            double score = 0.0;
            for (int d = 0; d < head_dim; ++d) {
              score += static_cast<double>(query.at(0, h * head_dim + d)) * keys[cell][static_cast<std::size_t>(d)];
            }
            const double weight = std::exp(score * static_cast<double>(scale()));
            total += weight;
            for (std::size_t d = 0; d < sums.size(); ++d) sums[d] += weight * values[cell][d];
          }
          for (std::size_t d = 0; d < sums.size(); ++d) {
            out.values[static_cast<std::size_t>(row * out.num_cols + h * head_dim) + d] =
                static_cast<float>(sums[d] / total);
          }
        }
      }
    }
    return out;
  }

 private:
  Matrix rows_of(std::size_t s, unsigned seed) const {
    Matrix rows = Matrix::random(sequences[s].keys, num_kv_heads * head_dim, seed + static_cast<unsigned>(s));
    if (sequences[s].shared_blocks > 0) {
      const Matrix before = rows_of(s - 1, seed);
      std::copy_n(before.values.begin(), sequences[s].shared_blocks * kBlockTokens * rows.num_cols,
                  rows.values.begin());
    }
    return rows;
  }
};

/// A policy with fields around the edges of blocks, tiles and splits.
inline KeyPolicy random_policy(std::mt19937& random) {
  const auto draw = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); };
  const int prefixes[] = {0, 0, 0, 1, 4, 16, 60, 64}, windows[] = {1, 15, 16, 17, 40, 64, 65, 100, 256};
  KeyPolicy policy;
  policy.rule = static_cast<KeyRule>(draw(1, 5));
  policy.prefix = prefixes[draw(0, 7)];
  policy.window = windows[draw(0, 8)];
  if (policy.rule == KeyRule::strided) policy.period = draw(1, 30);
  if (policy.rule == KeyRule::block) {
    policy.period = draw(1, 40) * 16;
    policy.keep = draw(0, policy.period / 16) * 16;
  }
  if (policy.rule == KeyRule::budget) policy.keep = draw(0, 20);
  if (policy.rule == KeyRule::summary) policy.period = draw(0, 1) == 0 ? draw(1, 300) : draw(1, 20) * 16;
  return policy;
}

/// Sequences with policies of all rules and without, of which some share blocks; lengths around the same edges.
inline PolicyProblem random_policy_problem(unsigned seed, quant::KvFormat format, bool sharing) {
  std::mt19937 random(seed);
  const auto draw = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); };
  const int edges[] = {128, 256, 256, 512, 768, 1024};
  const int shapes[][3] = {{6, 2, 16}, {5, 1, 32}, {4, 4, 16}, {30, 1, 16}};
  const auto& shape = shapes[draw(0, 3)];
  PolicyProblem problem{shape[0], shape[1], shape[2], format, draw(0, 5) == 0 ? draw(30, 400) : 0, {}, {}};
  for (int i = 0; i < 6; ++i) problem.policies.push_back(random_policy(random));
  int before = 0;
  for (int s = sharing ? 5 : 3; s > 0; --s) {
    const int keys = edges[draw(0, 5)] + draw(-17, 17), rows = draw(0, 1) == 0 ? 1 : draw(2, std::min(keys, 40));
    const int most = std::min(keys, before) / kBlockTokens;
    const int shared = !sharing || draw(0, 4) == 0 ? 0 : draw(0, 1) == 0 ? most : draw(0, most);
    problem.sequences.push_back({keys, rows, draw(0, 7) == 0 ? -1 : draw(0, 5), shared});
    before = keys;
  }
  return problem;
}

}  // namespace nb::ops
