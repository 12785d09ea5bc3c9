#include "model/model.h"

#include "base/error.h"

namespace nb::model {
namespace {

const ops::KernelTable& choose_table(const ModelConfig& config, const ops::Backend& backend, bool deterministic) {
  NB_CHECK(backend.kernels->layout == ops::WeightLayout::rows || config.head_dim % 16 == 0, unsupported, "backend ",
           backend.kernels->name, " needs head_dim to be a multiple of 16, the model has ", config.head_dim);
  return deterministic && backend.deterministic != nullptr ? *backend.deterministic : *backend.kernels;
}

}  // namespace

Model::Model(ModelConfig config, ModelWeights weights, const ops::Backend& backend, std::unique_ptr<ThreadPool> pool,
             bool deterministic, const FusionOptions& fusion)
    : config_(std::move(config)),
      weights_(std::move(weights)),
      backend_(backend),
      table_(choose_table(config_, backend, deterministic)),
      pool_(std::move(pool)),
      fusion_(plan_fusion(fusion, config_, weights_, table_, *pool_)),
      kernels_(ops::with_fused(table_, fusion_.fused)),
      decoder_(config_, weights_, config_.max_position_embeddings, kernels_.memory) {}

ops::ActType Model::act_type() const { return weights_.layers.front().qkv.act_type; }

quant::KvFormat Model::default_kv_format() const {
  return backend_.kernels->layout == ops::WeightLayout::rows ? quant::KvFormat::f32 : quant::KvFormat::bf16;
}

}  // namespace nb::model
