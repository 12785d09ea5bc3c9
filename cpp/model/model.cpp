#include "model/model.h"

#include "base/error.h"

namespace nb::model {

Model::Model(ModelConfig config, ModelWeights weights, const ops::Backend& backend, std::unique_ptr<ThreadPool> pool,
             bool deterministic)
    : config_(std::move(config)),
      weights_(std::move(weights)),
      backend_(backend),
      kernels_(deterministic && backend.deterministic != nullptr ? *backend.deterministic : *backend.kernels),
      pool_(std::move(pool)),
      decoder_(config_, weights_, config_.max_position_embeddings, kernels_.memory) {
  NB_CHECK(backend.kernels->layout == ops::WeightLayout::rows || config_.head_dim % 16 == 0, unsupported, "backend ",
           backend.kernels->name, " needs head_dim to be a multiple of 16, the model has ", config_.head_dim);
}

ops::ActType Model::act_type() const { return weights_.layers.front().qkv.act_type; }

quant::KvFormat Model::default_kv_format() const {
  return backend_.kernels->layout == ops::WeightLayout::rows ? quant::KvFormat::f32 : quant::KvFormat::bf16;
}

}  // namespace nb::model
