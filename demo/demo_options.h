// What the native demos share: the options of the command line, and a model file opened as tokenizer, model and engine.
//
// Not part of the library. A wrong option is an `Error` that names it; run_demo prints it in one line and exits with 2.
#pragma once

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/error.h"
#include "engine/engine.h"
#include "engine/kv_selftest.h"
#include "io/file_digest.h"
#include "io/gguf_tokenizer.h"
#include "model/loader.h"
#include "quant/kv_format.h"
#include "text/selftest_text.h"
#include "text/tokenizer.h"
#include "text/unicode.h"

namespace demo {

inline constexpr std::size_t kMaxTextBytes = 16 << 20;  // of a line or file that is read

struct Options {
  std::string model;
  std::string device;                              // "" is the best this machine can run
  int threads = 0;                                 // 0 is one per processor
  std::optional<nb::quant::KvFormat> kv_format{};  // none is the model's default
  bool force_kv_dtype = false;
  int max_model_len = 0;
  int max_tokens = 64;
  nb::sampling::SamplingParams sampling{};
  std::optional<std::int64_t> stream_weights{};  // memory for weights; 0 is as little as there must be
  std::string stream_cache_dir;                  // where packed layers are kept
  std::string system;                            // chat_demo only
  std::string prompts_file;                      // this and the next four: batched_infer_multi_prompts only
  int repeat = 1;
  std::vector<int> output_lens;  // empty: max_tokens for all
  int max_num_seqs = 16;
  std::int64_t kv_cache_bytes = 0;  // 0 is the engine's choice
  bool verify = false;
  std::vector<std::string> prompts;
};

/// An option that not every demo has.
struct OwnFlag {
  std::string_view name;
  const char* help;  ///< its line of --help
  bool takes_value = true;
};

/// What differs between the demos.
struct Program {
  const char* name;
  const char* arguments;  ///< what follows the options, for --help
  const char* about;
  std::vector<OwnFlag> own_flags{};
  Options defaults{};

  const OwnFlag* own_flag(std::string_view flag) const {
    for (const OwnFlag& own : own_flags) {
      if (own.name == flag) return &own;
    }
    return nullptr;
  }
};

template <class Number>
Number parse_number(std::string_view flag, std::string_view text, Number least, Number most) {
  Number value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  NB_CHECK(error == std::errc() && end == text.data() + text.size() && value >= least && value <= most,
           invalid_argument, flag, " must be a number from ", least, " to ", most, ", got ", nb::text::in_quotes(text));
  return value;
}

/// Numbers separated by commas, each at least 1.
inline std::vector<int> parse_lengths(std::string_view flag, std::string_view text) {
  std::vector<int> lengths;
  for (std::size_t begin = 0; begin <= text.size();) {
    const std::size_t end = std::min(text.find(',', begin), text.size());
    lengths.push_back(parse_number(flag, text.substr(begin, end - begin), 1, std::numeric_limits<int>::max()));
    begin = end + 1;
  }
  return lengths;
}

inline void print_help(const Program& program) {
  std::printf("usage: %s --model FILE [options] %s\n\n%s\n\n", program.name, program.arguments, program.about);
  for (const OwnFlag& own : program.own_flags) std::printf("  %s\n", own.help);
  const Options& d = program.defaults;
  std::printf(
      "  --model FILE            the model file\n"
      "  --device NAME           auto, cpu, or one backend such as avx2 or reference (auto)\n"
      "  --threads N             0 is one per processor (0)\n"
      "  --kv-dtype NAME         keys and values: bf16, f32, int8, mixed (the model's default)\n"
      "  --force-kv-dtype        have them even if the self-test says that they harm the model\n"
      "  --stream-weights BYTES  most memory for weights, 0 the least; the rest is read in each step (all stay)\n"
      "  --stream-cache-dir DIR  where packed layers are kept, a file as large as the model; needed to stream\n"
      "  --max-model-len N       longest prompt plus answer in tokens; 0 is what the model has (0)\n"
      "  --max-tokens N          most tokens of an answer (%d)\n"
      "  --temperature X         0 takes the most likely token (%g)\n"
      "  --top-k N               keep the N most likely tokens; 0 or -1 keeps all (%d)\n"
      "  --top-p X               keep the most likely tokens up to this mass (%g)\n"
      "  --min-p X               drop tokens less likely than this share of the most likely one (%g)\n"
      "  --repetition-penalty X  above 1 disfavours tokens that were there before (%g)\n"
      "  --seed N                equal seeds draw equal tokens (random)\n"
      "  --help                  print this\n",
      d.max_tokens, d.sampling.temperature, d.sampling.top_k, d.sampling.top_p, d.sampling.min_p,
      d.sampling.repetition_penalty);
}

/// Sets one option; false if there is no such flag.
inline bool set_option(Options& options, const Program& program, std::string_view flag, const std::string& value) {
  constexpr int kMostInt = std::numeric_limits<int>::max();
  constexpr double kMost = std::numeric_limits<double>::max();
  nb::sampling::SamplingParams& sampling = options.sampling;
  if (flag == "--model")
    options.model = value;
  else if (flag == "--device")
    options.device = value == "cpu" || value == "auto" ? "" : value;
  else if (flag == "--threads")
    options.threads = parse_number(flag, value, 0, 1024);
  else if (flag == "--kv-dtype")
    options.kv_format = nb::quant::parse_kv_format(value);
  else if (flag == "--force-kv-dtype")
    options.force_kv_dtype = true;
  else if (flag == "--stream-weights")
    options.stream_weights = parse_number<std::int64_t>(flag, value, 0, std::numeric_limits<std::int64_t>::max());
  else if (flag == "--stream-cache-dir")
    options.stream_cache_dir = value;
  else if (flag == "--max-model-len")
    options.max_model_len = parse_number(flag, value, 0, kMostInt);
  else if (flag == "--max-tokens")
    options.max_tokens = parse_number(flag, value, 1, kMostInt);
  else if (flag == "--temperature")
    sampling.temperature = parse_number(flag, value, 0.0, kMost);
  else if (flag == "--top-k")
    sampling.top_k = parse_number(flag, value, -1, kMostInt);
  else if (flag == "--top-p")
    sampling.top_p = parse_number(flag, value, std::numeric_limits<double>::min(), 1.0);
  else if (flag == "--min-p")
    sampling.min_p = parse_number(flag, value, 0.0, 1.0);
  else if (flag == "--repetition-penalty")
    sampling.repetition_penalty = parse_number(flag, value, std::numeric_limits<double>::min(), kMost);
  else if (flag == "--seed")
    sampling.seed = parse_number<std::uint64_t>(flag, value, 0, std::numeric_limits<std::uint64_t>::max());
  else if (program.own_flag(flag) == nullptr)
    return false;
  else if (flag == "--system")
    options.system = value;
  else if (flag == "--prompts-file")
    options.prompts_file = value;
  else if (flag == "--repeat")
    options.repeat = parse_number(flag, value, 1, 1 << 20);
  else if (flag == "--output-lens")
    options.output_lens = parse_lengths(flag, value);
  else if (flag == "--max-num-seqs")
    options.max_num_seqs = parse_number(flag, value, 1, 1 << 16);
  else if (flag == "--kv-cache-bytes")
    options.kv_cache_bytes = parse_number<std::int64_t>(flag, value, 0, std::numeric_limits<std::int64_t>::max());
  else if (flag == "--verify")
    options.verify = true;
  else
    return false;
  return true;
}

/// Flags are `--name value` or `--name=value`, or `--name` if they take none; the rest are prompts, as is everything
/// after `--`.
inline Options parse_options(const Program& program, int argc, char** argv) {
  Options options = program.defaults;
  bool flags_end = false;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (!flags_end && argument == "--") {
      flags_end = true;
    } else if (flags_end || argument.empty() || argument[0] != '-') {
      options.prompts.push_back(argument);
    } else {
      const std::size_t equals = argument.find('=');
      const std::string flag = argument.substr(0, equals);
      const OwnFlag* own = program.own_flag(flag);
      if (flag == "--force-kv-dtype" || (own != nullptr && !own->takes_value)) {
        NB_CHECK(equals == std::string::npos, invalid_argument, nb::text::in_quotes(flag), " takes no value");
        set_option(options, program, flag, "");
        continue;
      }
      const bool has_value = equals != std::string::npos || i + 1 < argc;
      const std::string value = equals != std::string::npos ? argument.substr(equals + 1) : has_value ? argv[++i] : "";
      NB_CHECK(has_value, invalid_argument, nb::text::in_quotes(flag), " needs a value; --help lists the options");
      NB_CHECK(set_option(options, program, flag, value), invalid_argument, "unknown option ",
               nb::text::in_quotes(flag), "; --help lists the options");
    }
  }
  NB_CHECK(!options.model.empty(), invalid_argument, "--model is missing: the path of a model file");
  return options;
}

/// A model file, opened. The engine borrows the model.
struct Session {
  std::shared_ptr<const nb::io::ModelSource> file;
  std::unique_ptr<const nb::text::Tokenizer> tokenizer;
  std::unique_ptr<nb::model::Model> model;
  std::unique_ptr<nb::engine::Engine> engine;
};

/// Measures a quantized format before it is used, at every start: a program that keeps no files has nowhere to
/// remember.
inline void check_kv_format(const Options& options, const Session& session) {
  if (!options.kv_format || nb::quant::kv_format_info(*options.kv_format).most_kl == 0.0) return;
  const std::vector<nb::TokenId> text = session.tokenizer->encode(nb::text::selftest_text());
  const nb::engine::KvSelftest found = nb::engine::measure_kv_format(*session.model, text, *options.kv_format);
  if (nb::engine::is_within_limit(found.format, found.cost())) return;
  const std::string why = nb::engine::kv_refusal(found.format, found.cost(), options.model, "--force-kv-dtype");
  if (!options.force_kv_dtype) nb::fail(nb::ErrorCode::unsupported, why);
  std::fprintf(stderr, "forced: %s\n", why.c_str());
}

inline Session open_session(const Options& options) {
  Session session;
  session.file = nb::io::open_model(options.model);
  session.tokenizer = nb::io::read_tokenizer(session.file->metadata());
  nb::model::ModelOptions model_options{.backend = options.device, .num_threads = options.threads};
  NB_CHECK(options.stream_weights.has_value() == !options.stream_cache_dir.empty(), invalid_argument,
           "--stream-weights and --stream-cache-dir are given together");
  if (options.stream_weights) {
    model_options.streaming = {.budget_bytes = *options.stream_weights,
                               .cache_directory = options.stream_cache_dir,
                               .content = nb::io::model_digest(*session.file, options.stream_cache_dir)};
  }
  session.model = nb::model::load_model(*session.file, model_options);
  nb::engine::EngineOptions engine_options;
  check_kv_format(options, session);
  engine_options.kv_format = options.kv_format;
  engine_options.max_model_len = options.max_model_len;
  engine_options.max_num_seqs = options.max_num_seqs;
  engine_options.kv_cache_bytes = options.kv_cache_bytes;
  engine_options.eos_ids = session.tokenizer->eos_ids();
  session.engine = std::make_unique<nb::engine::Engine>(*session.model, engine_options);
  return session;
}

inline nb::engine::Request make_request(const Options& options, std::vector<nb::TokenId> prompt) {
  nb::engine::Request request;
  request.prompt = std::move(prompt);
  request.sampling = options.sampling;
  request.max_tokens = options.max_tokens;
  return request;
}

/// Reads a line without its end; false at the end of the input. Throws invalid_argument beyond kMaxTextBytes.
inline bool read_line(std::istream& in, std::string& line) {
  line.clear();
  for (int c = in.get(); c != std::char_traits<char>::eof(); c = in.get()) {
    if (c == '\n') return true;
    line += static_cast<char>(c);
    NB_CHECK(line.size() <= kMaxTextBytes, invalid_argument, "a line has more than ", kMaxTextBytes, " bytes");
  }
  return !line.empty();
}

/// Tokens after the first, per second.
inline double tokens_per_second(int num_tokens, const nb::engine::RequestMetrics& metrics) {
  const double ms = metrics.total_ms - metrics.ttft_ms;
  return num_tokens > 1 && ms > 0.0 ? (num_tokens - 1) / ms * 1e3 : 0.0;
}

/// main of a demo: parses, runs, and turns an exception into one line on stderr and exit code 2.
inline int run_demo(const Program& program, int argc, char** argv, int (*run)(const Options&)) {
  for (int i = 1; i < argc && std::string_view(argv[i]) != "--"; ++i) {
    if (std::string_view(argv[i]) == "--help") return print_help(program), 0;
  }
  try {
    return run(parse_options(program, argc, argv));
  } catch (const std::exception& error) {
    std::fflush(stdout);
    std::fprintf(stderr, "%s: error: %s\n", program.name, error.what());
    return 2;
  }
}

}  // namespace demo
