// Whether a backend's fused operators are numerically sound for a model: what that is measured by, and who decides.
//
// A fused kernel may round where the small operators do not, and a model may amplify it: a query-key norm with large
// weights multiplies every error of a query and a key. So a few rows go through both forms with the model's own
// weights when it is loaded. Not for the dispatch itself (ops/fusion.h). Used by the thread that loads.
#pragma once

#include <string>
#include <vector>

#include "base/threads.h"
#include "model/config.h"
#include "model/weights.h"
#include "ops/fusion.h"

namespace nb::model {

/// automatic: fused where the measured errors are within their bounds; on: wherever the backend has a kernel; off:
/// nowhere.
enum class Fusion : std::uint8_t { automatic, on, off };

const char* to_string(Fusion fusion);

/// "auto", "on" or "off"; throws invalid_argument naming the option.
Fusion parse_fusion(const std::string& name);

/// Most that the product of a query and a key, as it enters softmax, may differ. The absolute difference matters:
/// softmax takes a difference d of two scores to a factor e^d between their weights, whatever the scores are, so 1/16
/// changes no attention weight by more than 6.5 %. Queries and keys rounded to bf16 before norm weights of 1 give at
/// most 2^-8 sqrt(D), 0.03 for heads of 64 and 0.045 for heads of 128; it grows with the product of both weights.
inline constexpr double kScoreBound = 1.0 / 16;

/// Most that any value may differ, relative to the root mean square of all: of the values of attention, of what is
/// added to the residual stream, and of logits. 1/128 is the largest error among thousands of outputs (five sigma) of a
/// product whose inputs were rounded to bf16 once, with a third to spare: a fused kernel may lose as much as an
/// activation type of our own does, and no more.
inline constexpr double kRelativeBound = 1.0 / 128;

/// How far apart the two forms of an operator are, at the worst of the rows and layers looked at.
struct FusionError {
  ops::FusedOp op;
  const char* quantity;  ///< "scores", "values", "residual", "down" (residual behind the gated rows), "logits"
  double error;          ///< absolute for scores, else relative; not finite where only one form is
  double bound;
  int layer;  ///< where; -1 for the head

  bool is_within() const { return error <= bound; }
};

struct FusionOptions {
  Fusion fusion = Fusion::automatic;
  bool measure = false;  ///< also where nothing depends on it: for whoever wants to see
};

/// What was decided for a model, and why.
struct FusionPlan {
  Fusion asked = Fusion::automatic;
  ops::PerFusedOp<bool> has_kernel{};
  ops::PerFusedOp<bool> fused{};    ///< the operator runs as one kernel (for up to max_fused_rows rows)
  std::vector<FusionError> errors;  ///< empty: not measured
  double seconds = 0.0;             ///< that measuring took
};

/// Runs 4 rows, the embeddings of seeded tokens, through both forms of every operator that has both, in two layers:
/// the first, and the one whose query-key norms and biases amplify most. Touches the matrices of these two layers and
/// of the head twice, and norms and biases of all. Neither `table` nor `weights` are changed.
///
/// The error of scores is an upper limit over all distances of query and key: |dq| |k| + |q| |dk|, times the scale of
/// attention, since rotation keeps lengths.
std::vector<FusionError> measure_fusion(const ModelConfig& config, const ModelWeights& weights,
                                        const ops::KernelTable& table, ThreadPool& pool);

/// Decides for every operator of `table`. `automatic` measures unless the table says that its fused operators are
/// exact; an operator any of whose errors is above its bound is composed.
FusionPlan plan_fusion(const FusionOptions& options, const ModelConfig& config, const ModelWeights& weights,
                       const ops::KernelTable& table, ThreadPool& pool);

/// "norm_qkv fused, head composed (...)": one line for logs and tables.
std::string describe(const FusionPlan& plan);

}  // namespace nb::model
