// Whether an attention plan can be computed: what a kernel could only answer with wrong numbers is refused before.
//
// Stateless; safe from any thread.
#pragma once

#include "ops/ops.h"

namespace nb::ops {

/// Throws invalid_argument that names the run or segment: keys or positions that are not all given or do not ascend, a
/// row too far from a run for the rotation table, segments that do not share the keys they claim to share, a policy
/// that is none or is on a segment whose keys it cannot tell by their index, a bias that is not finite.
void check_plan(const AttentionPlan& plan, const RopeTable& table);

/// Throws invalid_argument that names the field of a policy that is out of range.
void check_policy(const KeyPolicy& policy);

/// Throws invalid_argument that names the summary: tokens that are not all in `blocks`, positions outside the rotation
/// table, a slot among its own tokens.
void check_summaries(std::span<const KvSummary> summaries, std::span<const int32_t> blocks, const RopeTable& table);

/// Throws invalid_argument that names a position outside the rotation table.
void check_positions(std::span<const int32_t> positions, const RopeTable& table);

/// Whether any segment has a policy or any run a bias.
bool uses_policies(const AttentionPlan& plan);

}  // namespace nb::ops
