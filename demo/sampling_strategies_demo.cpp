// One prompt continued with several ways of drawing tokens, side by side in one batch, without Python.
//
//   sampling_strategies_demo --model MODEL.gguf --seed 1 "My favourite colour is"
//
// Every row but the greedy one uses the temperature; each of the next ones adds one filter, the last has all of them.
// The repetition penalty applies to every row. A seed is printed, so that a run can be repeated.
#include <map>
#include <random>

#include "demo_options.h"
#include "text/text_stream.h"

namespace {

struct Strategy {
  const char* name;
  bool temperature, top_k, top_p, min_p;  // which of the options the row uses
};

constexpr Strategy kStrategies[] = {
    {"greedy", false, false, false, false}, {"temperature", true, false, false, false},
    {"top-k", true, true, false, false},    {"top-p", true, false, true, false},
    {"min-p", true, false, false, true},    {"combined", true, true, true, true},
};

nb::sampling::SamplingParams params_of(const Strategy& strategy, const nb::sampling::SamplingParams& given) {
  nb::sampling::SamplingParams params;
  params.temperature = strategy.temperature ? given.temperature : 0.0;
  if (strategy.top_k) params.top_k = given.top_k;
  if (strategy.top_p) params.top_p = given.top_p;
  if (strategy.min_p) params.min_p = given.min_p;
  params.repetition_penalty = given.repetition_penalty;
  params.seed = given.seed;
  return params;
}

int run(const demo::Options& given) {
  NB_CHECK(given.prompts.size() == 1, invalid_argument, "one prompt is wanted, got ", given.prompts.size());
  demo::Options options = given;
  if (!options.sampling.seed) options.sampling.seed = std::random_device()();
  const demo::Session session = demo::open_session(options);
  const std::vector<nb::TokenId> prompt = session.tokenizer->encode(options.prompts[0]);

  struct Row {
    nb::text::TextStream stream;
    std::string text{};
  };
  std::map<nb::RequestId, Row> rows;  // ids ascend in order of submission
  for (const Strategy& strategy : kStrategies) {
    nb::engine::Request request = demo::make_request(options, prompt);
    request.sampling = params_of(strategy, options.sampling);
    rows.emplace(session.engine->submit(std::move(request)), Row{nb::text::TextStream(*session.tokenizer)});
  }
  while (session.engine->has_work()) {
    for (const nb::engine::StepOutput& output : session.engine->step()) {
      Row& row = rows.at(output.request_id);
      for (nb::TokenId token : output.token_ids) row.text += row.stream.push(token);
    }
  }

  const nb::sampling::SamplingParams& s = options.sampling;
  std::printf("temperature %g, top-k %d, top-p %g, min-p %g, repetition penalty %g, seed %llu\n", s.temperature,
              s.top_k, s.top_p, s.min_p, s.repetition_penalty, static_cast<unsigned long long>(*s.seed));
  const Strategy* strategy = kStrategies;
  for (auto& [id, row] : rows) {
    row.text += row.stream.finish();
    for (char& c : row.text) c = c == '\n' ? ' ' : c;  // one line a row
    std::printf("%-12s %s\n", (strategy++)->name, row.text.c_str());
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  demo::Program program{"sampling_strategies_demo", "PROMPT", "Continues one prompt in six ways, side by side."};
  program.defaults.max_tokens = 32;
  program.defaults.sampling.temperature = 0.8;
  program.defaults.sampling.top_k = 40;
  program.defaults.sampling.top_p = 0.95;
  program.defaults.sampling.min_p = 0.05;
  return demo::run_demo(program, argc, argv, run);
}
