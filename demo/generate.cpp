// Loads a model file and continues a prompt, without Python.
//
//   generate --model MODEL.gguf --max-tokens 16 "The capital of France is"
//
// Prints the text as it comes, then where time and memory went. The order of things here is the life of a request:
// file -> tokenizer and weights -> engine -> submit -> step until done -> text.
#include <algorithm>

#include "base/memory_info.h"
#include "demo_options.h"
#include "quant/kv_format.h"
#include "text/text_stream.h"

namespace {

double mib(double bytes) { return bytes / (1 << 20); }

int run(const demo::Options& options) {
  NB_CHECK(options.prompts.size() == 1, invalid_argument, "one prompt is wanted, got ", options.prompts.size());
  const std::string& prompt = options.prompts[0];
  const nb::engine::Clock::time_point begin = nb::engine::Clock::now();
  const demo::Session session = demo::open_session(options);
  nb::engine::Engine& engine = *session.engine;
  engine.submit(demo::make_request(options, session.tokenizer->encode(prompt)));

  std::printf("%s", prompt.c_str());
  nb::text::TextStream stream(*session.tokenizer);
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

  const nb::model::Model& model = *session.model;
  const nb::engine::EngineStats stats = engine.stats();
  const double kv_bytes = static_cast<double>(stats.kv_bytes) / stats.blocks_total * blocks_used;
  std::fprintf(stderr, "backend %s, %d threads, KV %s\n", model.backend().kernels->name, model.pool().num_threads(),
               nb::quant::to_string(*engine.options().kv_format));
  std::fprintf(stderr, "start to first token %.0f ms, then %.1f tokens/s (%d tokens)\n", first_token_ms,
               demo::tokens_per_second(num_tokens, metrics), num_tokens);
  std::fprintf(stderr, "file %.1f MiB, weights %.1f, KV used %.1f, workspace %.1f, peak resident %.1f MiB\n",
               mib(static_cast<double>(session.file->file_bytes())), mib(static_cast<double>(model.weights().bytes)),
               mib(kv_bytes), mib(static_cast<double>(stats.workspace_bytes)),
               mib(static_cast<double>(nb::memory_info().peak_rss_bytes)));
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  demo::Program program{"generate", "PROMPT", "Continues a prompt; greedy unless told otherwise."};
  program.defaults.sampling.temperature = 0.0;
  return demo::run_demo(program, argc, argv, run);
}
