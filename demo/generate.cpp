// Loads a model file and continues a prompt, without Python.
//
//   generate MODEL.gguf "The capital of France is" [MAX_TOKENS] [THREADS]
//
// Prints the text as it comes, then where time and memory went. The order of things here is the life of a request:
// file -> tokenizer and weights -> engine -> submit -> step until done -> text.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>

#include "base/memory_info.h"
#include "engine/engine.h"
#include "io/gguf_tokenizer.h"
#include "model/loader.h"
#include "quant/kv_format.h"
#include "text/text_stream.h"
#include "text/tokenizer.h"

namespace {

double mib(double bytes) { return bytes / (1 << 20); }

int number_or(const char* text, int missing) { return text != nullptr ? std::atoi(text) : missing; }

int run(int argc, char** argv) {
  const std::string path = argv[1], prompt = argv[2];
  const nb::engine::Clock::time_point begin = nb::engine::Clock::now();

  const auto file = nb::io::open_model(path);
  const auto file_bytes = static_cast<double>(file->file_bytes());
  auto tokenizer = std::make_unique<nb::text::Tokenizer>(nb::io::read_tokenizer_spec(file->metadata()));
  nb::model::ModelOptions options;
  options.num_threads = number_or(argc > 4 ? argv[4] : nullptr, 0);
  auto model = nb::model::load_model(*file, options);

  nb::engine::EngineOptions engine_options;
  engine_options.eos_ids = tokenizer->eos_ids();
  nb::engine::Engine engine(*model, engine_options);
  nb::engine::Request request;
  request.prompt = tokenizer->encode(prompt);
  request.max_tokens = number_or(argc > 3 ? argv[3] : nullptr, 64);
  request.sampling.temperature = 0.0;
  engine.submit(std::move(request));

  std::printf("%s", prompt.c_str());
  nb::text::TextStream stream(*tokenizer);
  nb::engine::RequestMetrics metrics;
  int num_tokens = 0;
  int blocks_used = 0;
  double first_token_ms = 0.0;
  while (engine.has_work()) {
    for (const nb::engine::StepOutput& output : engine.step()) {
      for (nb::TokenId token : output.token_ids) std::fputs(stream.push(token).c_str(), stdout);
      if (num_tokens == 0 && !output.token_ids.empty()) {
        first_token_ms = nb::engine::milliseconds(nb::engine::Clock::now() - begin);
      }
      num_tokens += static_cast<int>(output.token_ids.size());
      metrics = output.metrics;
    }
    blocks_used = std::max(blocks_used, engine.stats().blocks_owned);
    std::fflush(stdout);
  }
  std::printf("%s\n", stream.finish().c_str());

  const nb::engine::EngineStats stats = engine.stats();
  const double kv_bytes = static_cast<double>(stats.kv_bytes) / stats.blocks_total * blocks_used;
  std::fprintf(stderr, "backend %s, %d threads, KV %s\n", model->backend().kernels->name, model->pool().num_threads(),
               nb::quant::to_string(*engine.options().kv_format));
  std::fprintf(stderr, "start to first token %.0f ms, then %.1f tokens/s (%d tokens)\n", first_token_ms,
               (num_tokens - 1) / (metrics.total_ms - metrics.ttft_ms) * 1e3, num_tokens);
  std::fprintf(stderr, "file %.1f MiB, weights %.1f, KV used %.1f, workspace %.1f, peak resident %.1f MiB\n",
               mib(file_bytes), mib(static_cast<double>(model->weights().bytes)), mib(kv_bytes),
               mib(static_cast<double>(stats.workspace_bytes)),
               mib(static_cast<double>(nb::memory_info().peak_rss_bytes)));
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    std::fprintf(stderr, "usage: generate MODEL.gguf PROMPT [MAX_TOKENS] [THREADS]\n");
    return 2;
  }
  try {
    return run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "generate: error: %s\n", error.what());
    return 2;
  }
}
