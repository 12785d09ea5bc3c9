// Several prompts of different lengths in one continuous batch, without Python.
//
//   batched_infer_multi_prompts --model MODEL.gguf "One, two, three," "The capital of France is"
//   batched_infer_multi_prompts --model MODEL.gguf --prompts-file prompts.txt --repeat 4 --output-lens 16,64 --verify
//
// A prompts file has one prompt per line; empty lines are left out. Texts go to stdout in the order of the requests, a
// table of the requests and the figures of the whole batch to stderr. Every text is the one the prompt would get alone:
// --verify asks each once more, alone and without a prefix cache, and exits with 1 if an answer differs.
#include <map>

#include "demo_options.h"
#include "text/text_stream.h"

namespace {

struct Answer {
  nb::text::TextStream stream;
  std::string text{};
  std::vector<nb::TokenId> tokens{};
  nb::engine::StepOutput last{};
};

/// What the steps of a run add up to.
struct Totals {
  std::size_t num_tokens = 0;
  std::size_t taken_part = 0;  // answers, summed over the steps
};

std::vector<std::string> all_prompts(const demo::Options& options) {
  std::vector<std::string> prompts = options.prompts;
  if (!options.prompts_file.empty()) {
    std::ifstream file(options.prompts_file, std::ios::binary);
    NB_CHECK(file, io, "cannot open --prompts-file ", options.prompts_file);
    std::size_t bytes = 0;
    for (std::string line; demo::read_line(file, line);) {
      bytes += line.size() + 1;
      NB_CHECK(bytes <= demo::kMaxTextBytes, invalid_argument, options.prompts_file, " has more than ",
               demo::kMaxTextBytes, " bytes");
      if (!line.empty()) prompts.push_back(line);
    }
    NB_CHECK(!file.bad(), io, "cannot read --prompts-file ", options.prompts_file);
  }
  NB_CHECK(!prompts.empty(), invalid_argument, "no prompts: give them as arguments or with --prompts-file");
  return prompts;
}

/// The requests: every prompt, `repeat` times over, with the output lengths in turn.
std::vector<nb::engine::Request> make_requests(const demo::Options& options, const std::vector<std::string>& prompts,
                                               const nb::text::Tokenizer& tokenizer) {
  std::vector<nb::engine::Request> requests;
  for (int round = 0; round < options.repeat; ++round) {
    for (const std::string& prompt : prompts) {
      requests.push_back(demo::make_request(options, tokenizer.encode(prompt)));
      const std::size_t index = requests.size() - 1;
      if (!options.output_lens.empty()) {
        requests.back().max_tokens = options.output_lens[index % options.output_lens.size()];
      }
    }
  }
  return requests;
}

/// Runs requests together, to their end. Answers in the order of the requests.
std::vector<Answer> answer_all(nb::engine::Engine& engine, const nb::text::Tokenizer& tokenizer,
                               std::span<const nb::engine::Request> requests, Totals& totals) {
  std::map<nb::RequestId, std::size_t> indices;
  std::vector<Answer> answers;
  for (const nb::engine::Request& request : requests) {
    indices.emplace(engine.submit(request), answers.size());
    answers.push_back({nb::text::TextStream(tokenizer)});
  }
  while (engine.has_work()) {
    for (nb::engine::StepOutput& output : engine.step()) {
      Answer& answer = answers[indices.at(output.request_id)];
      for (const nb::TokenId token : output.token_ids) answer.text += answer.stream.push(token);
      answer.tokens.insert(answer.tokens.end(), output.token_ids.begin(), output.token_ids.end());
      totals.num_tokens += output.token_ids.size();
      ++totals.taken_part;
      answer.last = std::move(output);
    }
  }
  for (Answer& answer : answers) answer.text += answer.stream.finish();
  return answers;
}

void print_table(const std::vector<Answer>& answers) {
  std::fprintf(stderr, "%7s %7s %7s %7s %9s %9s %9s  %s\n", "request", "prompt", "cached", "new", "queue ms", "TTFT ms",
               "tokens/s", "end");
  for (std::size_t i = 0; i < answers.size(); ++i) {
    const nb::engine::StepOutput& last = answers[i].last;
    const int num_tokens = static_cast<int>(answers[i].tokens.size());
    std::fprintf(stderr, "%7zu %7d %7d %7d %9.1f %9.1f %9.1f  %s\n", i, last.num_prompt_tokens, last.num_cached_tokens,
                 num_tokens, last.metrics.queue_ms, last.metrics.ttft_ms,
                 demo::tokens_per_second(num_tokens, last.metrics), nb::engine::to_string(last.finish_reason));
  }
}

/// Asks every prompt alone; returns how many answers differ, and prints them.
int count_differences(const demo::Session& session, const std::vector<nb::engine::Request>& requests,
                      const std::vector<Answer>& answers) {
  nb::engine::EngineOptions alone = session.engine->options();
  alone.max_num_seqs = 1;
  alone.kv_cache_bytes = 0;
  alone.enable_prefix_caching = false;
  nb::engine::Engine engine(*session.model, alone);
  int differences = 0;
  for (std::size_t i = 0; i < requests.size(); ++i) {
    Totals totals;
    const Answer answer = std::move(answer_all(engine, *session.tokenizer, {&requests[i], 1}, totals).front());
    if (answer.tokens == answers[i].tokens && answer.text == answers[i].text) continue;
    ++differences;
    std::fprintf(stderr, "request %zu differs; alone: %s\n", i, answer.text.c_str());
  }
  std::fprintf(stderr, "verify: %zu of %zu answers are those of the prompts alone\n",
               requests.size() - static_cast<std::size_t>(differences), requests.size());
  return differences;
}

int run(const demo::Options& options) {
  NB_CHECK(!options.verify || options.sampling.temperature == 0.0 || options.sampling.seed, invalid_argument,
           "--verify needs --seed or --temperature 0, or two answers to one prompt would differ by chance");
  const std::vector<std::string> prompts = all_prompts(options);
  const demo::Session session = demo::open_session(options);
  const std::vector<nb::engine::Request> requests = make_requests(options, prompts, *session.tokenizer);
  const nb::engine::Clock::time_point begin = nb::engine::Clock::now();
  Totals totals;
  const std::vector<Answer> answers = answer_all(*session.engine, *session.tokenizer, requests, totals);
  const double seconds = nb::engine::milliseconds(nb::engine::Clock::now() - begin) / 1e3;

  for (std::size_t i = 0; i < answers.size(); ++i) {
    std::printf("[%zu] %s%s\n", i, prompts[i % prompts.size()].c_str(), answers[i].text.c_str());
  }
  print_table(answers);
  const nb::engine::EngineStats stats = session.engine->stats();
  std::fprintf(stderr,
               "total: %zu requests, %zu new tokens in %.2f s, %.1f tokens/s, %lld steps, %.2f answers in a step, "
               "%lld preemptions, %lld tokens from the prefix cache\n",
               answers.size(), totals.num_tokens, seconds, static_cast<double>(totals.num_tokens) / seconds,
               static_cast<long long>(stats.steps),
               static_cast<double>(totals.taken_part) / static_cast<double>(stats.steps),
               static_cast<long long>(stats.preemptions), static_cast<long long>(stats.prefix_hit_tokens));
  return options.verify && count_differences(session, requests, answers) > 0 ? 1 : 0;
}

}  // namespace

int main(int argc, char** argv) {
  demo::Program program{"batched_infer_multi_prompts", "[PROMPT...]",
                        "Continues several prompts in one continuous batch; greedy unless told otherwise."};
  program.own_flags = {
      {"--prompts-file", "--prompts-file FILE     more prompts, one per line"},
      {"--repeat", "--repeat N              ask everything N times (1)"},
      {"--output-lens", "--output-lens A,B,...   most tokens of the answers in turn, instead of --max-tokens"},
      {"--max-num-seqs", "--max-num-seqs N        requests computed together (16)"},
      {"--kv-cache-bytes", "--kv-cache-bytes N      memory for keys and values; 0 is the engine's choice (0)"},
      {"--verify", "--verify                ask each prompt again, alone; exit with 1 if an answer differs", false}};
  program.defaults.sampling.temperature = 0.0;
  return demo::run_demo(program, argc, argv, run);
}
