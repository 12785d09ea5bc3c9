// A loaded model: facts, weights packed for one backend, decoder, and the thread team that runs it.
//
// Created once from a file; the engine borrows it. One engine runs it at a time.
#pragma once

#include <memory>
#include <optional>
#include <string>

#include "base/threads.h"
#include "model/config.h"
#include "model/decoder.h"
#include "model/fusion.h"
#include "model/stream_plan.h"
#include "model/weights.h"
#include "ops/backends.h"

namespace nb::model {

struct ModelOptions {
  std::string backend = "";    ///< "" = NANOBRAID_BACKEND or the fastest this machine can run
  std::string dtype = "auto";  ///< activations entering matrix products: auto, int8, bf16, f32
  int num_threads = 0;         ///< 0 = every processor this process may use
  bool deterministic = false;  ///< the same bits for any number of rows, where a device does not keep that by itself
  FusionOptions fusion{};      ///< which operators may run as one kernel
  std::optional<StreamingOptions> streaming{};  ///< layers stay within a budget; none: all weights are in memory
};

class Model {
 public:
  /// Takes ownership of parts made by a loader (model/loader.h) or by a test.
  Model(ModelConfig config, ModelWeights weights, const ops::Backend& backend, std::unique_ptr<ThreadPool> pool,
        bool deterministic = false, const FusionOptions& fusion = {});

  const ModelConfig& config() const { return config_; }
  const ModelWeights& weights() const { return weights_; }
  const Decoder& decoder() const { return decoder_; }
  const ops::Backend& backend() const { return backend_; }
  /// Those of the backend that the model was loaded for, with the fused operators of fusion() only.
  const ops::KernelTable& kernels() const { return kernels_; }
  /// Whether they are those that give the same bits for any number of rows.
  bool deterministic() const { return &table_ == backend_.deterministic; }
  /// Which operators run as one kernel, and why.
  const FusionPlan& fusion() const { return fusion_; }
  /// Where weights and KV lie; null for the host.
  const DeviceMemory* memory() const { return kernels_.memory; }
  ThreadPool& pool() const { return *pool_; }
  /// What rows entering the first layer's projections are prepared as.
  ops::ActType act_type() const;
  /// bf16 on tiled backends, f32 on the reference backend.
  quant::KvFormat default_kv_format() const;

 private:
  ModelConfig config_;
  ModelWeights weights_;
  const ops::Backend& backend_;
  const ops::KernelTable& table_;  // the backend's own
  std::unique_ptr<ThreadPool> pool_;
  FusionPlan fusion_;
  ops::KernelTable kernels_;
  Decoder decoder_;
};

}  // namespace nb::model
