// Several prompts of different lengths in one continuous batch, without Python.
//
//   batched_infer_multi_prompts --model MODEL.gguf "One, two, three," "The capital of France is"
//   batched_infer_multi_prompts --model MODEL.gguf --prompts-file prompts.txt
//
// A prompts file has one prompt per line; empty lines are left out. Texts go to stdout in the order of the prompts, the
// speed of each request and of the whole batch to stderr. Every text is the one the prompt would get alone.
#include <map>

#include "demo_options.h"
#include "text/text_stream.h"

namespace {

struct Answer {
  nb::text::TextStream stream;
  std::string text{};
  int num_tokens = 0;
  nb::engine::StepOutput last{};
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

int run(const demo::Options& options) {
  const std::vector<std::string> prompts = all_prompts(options);
  const demo::Session session = demo::open_session(options);
  const nb::engine::Clock::time_point begin = nb::engine::Clock::now();
  std::map<nb::RequestId, Answer> answers;  // ids ascend in order of submission
  for (const std::string& prompt : prompts) {
    const nb::RequestId id = session.engine->submit(demo::make_request(options, session.tokenizer->encode(prompt)));
    answers.emplace(id, Answer{nb::text::TextStream(*session.tokenizer)});
  }

  int num_tokens = 0;
  while (session.engine->has_work()) {
    for (nb::engine::StepOutput& output : session.engine->step()) {
      Answer& answer = answers.at(output.request_id);
      for (nb::TokenId token : output.token_ids) answer.text += answer.stream.push(token);
      answer.num_tokens += static_cast<int>(output.token_ids.size());
      num_tokens += static_cast<int>(output.token_ids.size());
      answer.last = std::move(output);
    }
  }
  const double seconds = nb::engine::milliseconds(nb::engine::Clock::now() - begin) / 1e3;

  std::size_t index = 0;
  for (auto& [id, answer] : answers) {
    answer.text += answer.stream.finish();
    std::printf("[%zu] %s%s\n", index, prompts[index].c_str(), answer.text.c_str());
    std::fprintf(stderr, "[%zu] %d prompt tokens, %d new, first token %.0f ms, %.1f tokens/s, %s\n", index,
                 answer.last.num_prompt_tokens, answer.num_tokens, answer.last.metrics.ttft_ms,
                 demo::tokens_per_second(answer.num_tokens, answer.last.metrics),
                 nb::engine::to_string(answer.last.finish_reason));
    ++index;
  }
  std::fprintf(stderr, "total: %zu requests, %d new tokens in %.2f s, %.1f tokens/s, %lld steps\n", prompts.size(),
               num_tokens, seconds, num_tokens / seconds, static_cast<long long>(session.engine->stats().steps));
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  demo::Program program{"batched_infer_multi_prompts", "[PROMPT...]",
                        "Continues several prompts in one continuous batch; greedy unless told otherwise."};
  program.own_flag = "--prompts-file";
  program.defaults.sampling.temperature = 0.0;
  return demo::run_demo(program, argc, argv, run);
}
