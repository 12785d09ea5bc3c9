// What the prefix cache saves: time from submission to the first token, cache off and on, without Python.
//
//   prefix_caching_benchmark --model MODEL.gguf [--max-tokens 32]
//
// Four workloads of random tokens: the same prompt again, prompts behind a shared system prompt, prompts that share
// nothing, and a conversation whose every turn goes on with the one before. Requests run one after the other; nothing
// is warmed outside the timer but the kernels, by one request that shares no token. Answers with the cache must be
// those without it, or the program fails.
#include <random>

#include "demo_options.h"

namespace {

using Tokens = std::vector<nb::TokenId>;

struct Turn {
  double ttft_ms = 0.0;
  int num_prompt = 0;
  int num_cached = 0;
  Tokens answer{};
};

class Bench {
 public:
  Bench(const demo::Options& options, const demo::Session& session, bool cached)
      : options_(options),
        engine_(*session.model, {.max_model_len = options.max_model_len, .enable_prefix_caching = cached}) {
    ask(random_tokens(64));
  }

  Tokens random_tokens(int count) {
    Tokens tokens;
    for (int i = 0; i < count; ++i) tokens.push_back(static_cast<nb::TokenId>(random_() % vocab_));
    return tokens;
  }

  Turn ask(Tokens prompt) {
    nb::engine::Request request = demo::make_request(options_, std::move(prompt));
    request.ignore_eos = true;
    engine_.submit(std::move(request));
    Turn turn;
    while (engine_.has_work()) {
      for (const nb::engine::StepOutput& output : engine_.step()) {
        turn.answer.insert(turn.answer.end(), output.token_ids.begin(), output.token_ids.end());
        turn.ttft_ms = output.metrics.ttft_ms;
        turn.num_prompt = output.num_prompt_tokens;
        turn.num_cached = output.num_cached_tokens;
      }
    }
    return turn;
  }

 private:
  const demo::Options& options_;
  nb::engine::Engine engine_;
  std::mt19937 random_{1};  // the same tokens with the cache off and on
  std::uint32_t vocab_ = static_cast<std::uint32_t>(engine_.model().config().vocab_size);
};

std::vector<Turn> same_prompt(Bench& bench) {
  const Tokens prompt = bench.random_tokens(1000);
  return {bench.ask(prompt), bench.ask(prompt), bench.ask(prompt)};
}

std::vector<Turn> shared_system_prompt(Bench& bench) {
  const Tokens system = bench.random_tokens(1000);
  std::vector<Turn> turns;
  for (int i = 0; i < 4; ++i) {
    Tokens prompt = system;
    const Tokens question = bench.random_tokens(16);
    prompt.insert(prompt.end(), question.begin(), question.end());
    turns.push_back(bench.ask(prompt));
  }
  return turns;
}

std::vector<Turn> disjoint(Bench& bench) {
  std::vector<Turn> turns;
  for (int i = 0; i < 3; ++i) turns.push_back(bench.ask(bench.random_tokens(1000)));
  return turns;
}

std::vector<Turn> conversation(Bench& bench) {
  Tokens history;
  std::vector<Turn> turns;
  for (int i = 0; i < 8; ++i) {
    const Tokens question = bench.random_tokens(68);
    history.insert(history.end(), question.begin(), question.end());
    turns.push_back(bench.ask(history));
    history.insert(history.end(), turns.back().answer.begin(), turns.back().answer.end());
  }
  return turns;
}

int run(const demo::Options& options) {
  NB_CHECK(options.prompts.empty(), invalid_argument, "unexpected argument ",
           nb::text::in_quotes(options.prompts.front()));
  const demo::Session session = demo::open_session(options);
  struct Workload {
    const char* name;
    std::vector<Turn> (*run)(Bench& bench);
  };
  const Workload workloads[] = {{"same prompt", same_prompt},
                                {"shared system prompt", shared_system_prompt},
                                {"disjoint", disjoint},
                                {"conversation", conversation}};
  Bench off(options, session, false);
  Bench on(options, session, true);
  std::printf("%-22s %4s %8s %13s %13s %8s %8s\n", "workload", "turn", "prompt", "TTFT off, ms", "TTFT on, ms", "ratio",
              "reused");
  for (const Workload& workload : workloads) {
    const std::vector<Turn> without = workload.run(off);
    const std::vector<Turn> with = workload.run(on);
    for (std::size_t i = 0; i < without.size(); ++i) {
      NB_CHECK(without[i].answer == with[i].answer, internal, workload.name, ": the cache changed an answer");
      std::printf("%-22s %4zu %8d %13.2f %13.2f %8.3f %7.1f%%\n", workload.name, i + 1, with[i].num_prompt,
                  without[i].ttft_ms, with[i].ttft_ms, with[i].ttft_ms / without[i].ttft_ms,
                  100.0 * with[i].num_cached / with[i].num_prompt);
    }
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  demo::Program program{"prefix_caching_benchmark", "",
                        "Measures the time to the first token with the prefix cache off and on."};
  program.defaults.sampling.temperature = 0.0;
  program.defaults.max_tokens = 32;
  return demo::run_demo(program, argc, argv, run);
}
