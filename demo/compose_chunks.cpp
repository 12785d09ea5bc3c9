// Puts a prompt together from documents and a question, and answers it in every mode of reuse, without Python.
//
//   compose_chunks --model MODEL.gguf "First document." "Second document." "Question"
//
// The documents are computed once, each by itself; then the question is asked behind them in two orders: exactly, with
// the documents as they are, and with 15 % of their tokens computed again. Prints the answers, and where the tokens of
// each prompt came from. An exact answer is what computing the whole prompt gives; the others are approximations.
#include "demo_options.h"

namespace {

using nb::engine::ChunkSpan;
using nb::engine::Request;
using nb::engine::ReuseMode;

/// The documents in this order as chunks, then the question.
Request compose(const demo::Options& options, const std::vector<std::vector<nb::TokenId>>& texts,
                const std::vector<std::size_t>& order) {
  Request request = demo::make_request(options, {});
  for (const std::size_t i : order) {
    request.chunks.push_back(
        {.begin = static_cast<int>(request.prompt.size()), .count = static_cast<int>(texts[i].size())});
    request.prompt.insert(request.prompt.end(), texts[i].begin(), texts[i].end());
  }
  request.prompt.insert(request.prompt.end(), texts.back().begin(), texts.back().end());
  return request;
}

/// Steps until the request has ended, and returns its last output with all of its tokens.
nb::engine::StepOutput answer(nb::engine::Engine& engine, Request request) {
  engine.submit(std::move(request));
  std::vector<nb::TokenId> tokens;
  nb::engine::StepOutput last;
  while (engine.has_work()) {
    for (nb::engine::StepOutput& output : engine.step()) {
      tokens.insert(tokens.end(), output.token_ids.begin(), output.token_ids.end());
      last = std::move(output);
    }
  }
  NB_CHECK(last.finish_reason != nb::engine::FinishReason::error, unsupported, last.error);
  last.token_ids = std::move(tokens);
  return last;
}

int run(const demo::Options& options) {
  NB_CHECK(options.prompts.size() >= 2, invalid_argument, "at least one document and a question are wanted, got ",
           options.prompts.size(), " texts");
  const demo::Session session = demo::open_session(options);
  nb::engine::Engine& engine = *session.engine;
  std::vector<std::vector<nb::TokenId>> texts;
  for (const std::string& text : options.prompts) texts.push_back(session.tokenizer->encode(text + "\n"));
  std::vector<std::size_t> order;
  for (std::size_t i = 0; i + 1 < texts.size(); ++i) order.push_back(i);

  Request documents = compose(options, texts, order);
  documents.only_chunks = true;
  documents.max_tokens = 0;
  const double chunks_ms = answer(engine, std::move(documents)).metrics.total_ms;
  std::fprintf(stderr, "%zu documents computed in %.1f ms\n\n", order.size(), chunks_ms);
  std::fprintf(stderr, "%-9s %-8s %9s %7s %9s %11s %9s\n", "order", "mode", "ttft ms", "cached", "isolated",
               "recomputed", "computed");
  for (const char* name : {"as given", "reversed"}) {
    for (const ReuseMode mode : {ReuseMode::isolated, ReuseMode::blend, ReuseMode::exact}) {
      Request request = compose(options, texts, order);
      request.reuse.mode = mode;
      const nb::engine::StepOutput output = answer(engine, std::move(request));
      const nb::engine::ReuseReport& reuse = output.reuse;
      std::fprintf(stderr, "%-9s %-8s %9.1f %7d %9d %11d %9d\n", name, to_string(reuse.mode), output.metrics.ttft_ms,
                   reuse.exact_prefix, reuse.isolated, reuse.recomputed, reuse.computed);
      std::printf("[%s, %s] %s\n", name, to_string(reuse.mode), session.tokenizer->decode(output.token_ids).c_str());
      std::fflush(stdout);
    }
    std::reverse(order.begin(), order.end());
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  demo::Program program{"compose_chunks", "DOCUMENT.. QUESTION",
                        "Answers a question behind documents that are chunks."};
  program.defaults.sampling.temperature = 0.0;
  program.defaults.max_tokens = 24;
  return demo::run_demo(program, argc, argv, run);
}
