// A conversation on the terminal, without Python: one line of input is one turn, the answer is printed as it is made.
//
//   chat_demo --model MODEL.gguf --system "Answer briefly."
//
// /clear begins a new conversation, /exit or the end of the input leaves. After each answer, on stderr: time to its
// first token and the speed of the rest. The file's chat template must be one of text/chat_render.h's formats. Every
// turn computes the whole conversation again.
#include <cstdlib>
#include <iostream>

#include "demo_options.h"
#include "text/chat_render.h"
#include "text/text_stream.h"

namespace {

using Messages = std::vector<nb::text::ChatMessage>;

/// Streams the answer to `prompt` and returns its text.
std::string answer(const demo::Session& session, nb::engine::Request request) {
  nb::engine::Engine& engine = *session.engine;
  engine.submit(std::move(request));
  nb::text::TextStream stream(*session.tokenizer);
  std::string text;
  nb::engine::StepOutput last;
  int num_tokens = 0;
  const auto print = [&text](const std::string& piece) {
    text += piece;
    std::fwrite(piece.data(), 1, piece.size(), stdout);
    std::fflush(stdout);
  };
  while (engine.has_work()) {
    for (nb::engine::StepOutput& output : engine.step()) {
      for (nb::TokenId token : output.token_ids) print(stream.push(token));
      num_tokens += static_cast<int>(output.token_ids.size());
      last = std::move(output);
    }
  }
  print(stream.finish());
  std::printf("\n");
  std::fflush(stdout);
  const bool is_cut = last.finish_reason == nb::engine::FinishReason::length;
  std::fprintf(stderr, "[first token %.0f ms, %.1f tokens/s, %d tokens%s]\n", last.metrics.ttft_ms,
               demo::tokens_per_second(num_tokens, last.metrics), num_tokens,
               is_cut ? ", cut by --max-tokens or the context" : "");
  return text;
}

int run(const demo::Options& options) {
  NB_CHECK(options.prompts.empty(), invalid_argument, "unexpected argument ", nb::text::in_quotes(options.prompts[0]),
           ": turns are read from standard input");
  const demo::Session session = demo::open_session(options);
  const std::optional<std::string> source = nb::io::read_chat_template(session.file->metadata());
  NB_CHECK(source, unsupported, options.model, " has no chat template");
  const nb::text::ChatFormat format = nb::text::find_chat_format(*source, *session.tokenizer);
  const auto room = static_cast<std::size_t>(session.engine->options().max_model_len);

  Messages beginning;
  if (!options.system.empty()) beginning.push_back({nb::text::ChatRole::system, options.system});
  Messages messages = beginning;
  std::string line;
  while (std::fputs("> ", stderr), demo::read_line(std::cin, line)) {
    if (line == "/exit") break;
    if (line.empty()) continue;
    if (line == "/clear") {
      messages = beginning;
      std::fputs("[a new conversation]\n", stderr);
      continue;
    }
    messages.push_back({nb::text::ChatRole::user, line});
    std::vector<nb::TokenId> prompt = nb::text::encode_chat(*session.tokenizer, render_chat(format, messages));
    if (prompt.size() >= room) {
      std::fprintf(stderr,
                   "[the context is full: the conversation has %zu tokens, the context %zu; the line was left "
                   "out, /clear begins a new conversation]\n",
                   prompt.size(), room);
      messages.pop_back();
      continue;
    }
    messages.push_back(
        {nb::text::ChatRole::assistant, answer(session, demo::make_request(options, std::move(prompt)))});
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  demo::Program program{"chat_demo", "", "Answers lines of standard input. /clear begins anew, /exit leaves."};
  program.own_flags = {{"--system", "--system TEXT           the system message"}};
  program.defaults.max_tokens = 512;
  program.defaults.sampling.temperature = 0.7;
  program.defaults.sampling.top_k = 40;
  program.defaults.sampling.top_p = 0.9;
  return demo::run_demo(program, argc, argv, run);
}
