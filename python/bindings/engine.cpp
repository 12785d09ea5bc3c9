// Engine and step outputs.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <thread>
#include <unordered_set>

#include "base/error.h"
#include "bindings.h"
#include "engine/engine_thread.h"
#include "loaded_model.h"
#include "quant/kv_format.h"

namespace py = pybind11;

namespace nb::bindings {
namespace {

// An engine that keeps its models alive.
struct ModelEngine {
  ModelEngine(std::shared_ptr<LoadedModel> source, std::shared_ptr<LoadedModel> draft_source,
              const engine::EngineOptions& options)
      : loaded(std::move(source)), draft(std::move(draft_source)), engine(*loaded->model, options) {}
  std::shared_ptr<LoadedModel> loaded;
  std::shared_ptr<LoadedModel> draft;  // none: nothing, or not a model, guesses
  engine::EngineThread engine;
  pid_t process = getpid();
};

// Python may drop the last reference anywhere, also in code that the engine's thread calls, which cannot wait for its
// own end; and whoever waits must not hold what the thread may be waiting for. In a forked process there is no thread
// to wait for, so there the engine stays.
struct DropEngine {
  void operator()(ModelEngine* engine) const {
    if (engine->process != getpid()) return;
    const py::gil_scoped_release release;
    if (engine->engine.is_this_thread()) {
      engine->engine.close();
      std::thread([engine] { delete engine; }).detach();
    } else {
      delete engine;
    }
  }
};

using EngineHolder = std::unique_ptr<ModelEngine, DropEngine>;

EngineHolder make_engine(std::shared_ptr<LoadedModel> model, const std::string& kv_dtype, int max_model_len,
                         int max_num_seqs, int max_batch_tokens, int max_waiting, std::int64_t kv_cache_bytes,
                         bool enable_prefix_caching, const std::string& trace_path, const std::string& kv_store_path,
                         std::int64_t kv_store_bytes, const std::optional<SpeculativeOption>& speculative,
                         std::shared_ptr<LoadedModel> draft_model, bool enforce_eager) {
  const py::gil_scoped_release release;
  engine::EngineOptions options;
  if (kv_dtype != "auto") options.kv_format = quant::parse_kv_format(kv_dtype);
  options.max_model_len = max_model_len;
  options.max_num_seqs = max_num_seqs;
  options.max_batch_tokens = max_batch_tokens;
  options.max_waiting = max_waiting;
  options.kv_cache_bytes = kv_cache_bytes;
  options.eos_ids = model->eos_ids;
  options.enable_prefix_caching = enable_prefix_caching;
  options.enforce_eager = enforce_eager;
  options.trace_path = trace_path;
  if (speculative) {
    options.speculative = parse_speculative(*speculative, draft_model == nullptr ? nullptr : draft_model->model.get());
  }
  if (!kv_store_path.empty()) {
    NB_CHECK(model->content.has_value(), invalid_argument, "a KV store needs a model with a digest_directory");
    options.kv_store_path = kv_store_path;
    options.kv_store_bytes = kv_store_bytes;
    options.kv_store_fingerprint = *model->content;
  }
  return EngineHolder(new ModelEngine(std::move(model), std::move(draft_model), options));
}

// Ends an answer with the token that completes a stop string.
class StopMonitor : public engine::TokenMonitor {
 public:
  StopMonitor(std::shared_ptr<const text::Tokenizer> tokenizer, bool at_start, StopRules rules)
      : stream_(std::move(tokenizer), true, at_start, std::move(rules)) {}
  bool ends_with(TokenId token) noexcept override {
    stream_.push(token);
    return stream_.matched() != nullptr;
  }

 private:
  StoppingStream stream_;
};

engine::ReuseMode parse_mode(const std::string& name) {
  for (const auto mode : {engine::ReuseMode::exact, engine::ReuseMode::isolated, engine::ReuseMode::blend}) {
    if (name == to_string(mode)) return mode;
  }
  throw Error(ErrorCode::invalid_argument, concat("reuse must be exact, isolated or blend, got '", name, "'"));
}

engine::BlendSelection parse_selection(const std::string& name) {
  NB_CHECK(name == "deviation" || name == "first", invalid_argument, "select must be deviation or first, got '", name,
           "'");
  return name == "first" ? engine::BlendSelection::first : engine::BlendSelection::deviation;
}

// (rule, prefix, window, period, keep), see ops::KeyPolicy; the rule may also be none.
using KeyPolicyOption = std::tuple<std::string, int, int, int, int>;

void set_policy(engine::Request& request, const KeyPolicyOption& option) {
  const auto& [rule, prefix, window, period, keep] = option;
  request.keeps_kv = rule != "none";
  if (!request.keeps_kv) return;
  const auto& rules = engine::kKvPolicyNames;  // in the order of KeyRule; the last, none, is no rule
  const auto found = std::find(rules.begin(), rules.end(), rule);
  NB_CHECK(found != rules.end(), invalid_argument, "there is no rule '", rule, "' of keys");
  request.key_policy = {static_cast<ops::KeyRule>(found - rules.begin()), prefix, window, period, keep};
}

// A function of the engine that is called between two steps.
template <class Function>
auto between_steps(ModelEngine& self, Function function) {
  const py::gil_scoped_release release;
  decltype(function(std::declval<engine::Engine&>())) result{};
  self.engine.call([&](engine::Engine& engine) { result = function(engine); });
  return result;
}

kv::ChunkId find_chunk(ModelEngine& self, const std::vector<TokenId>& tokens, const std::vector<TokenId>& anchor,
                       const std::string& cache_salt) {
  const kv::ChunkContent wanted = kv::ChunkStore::content(kv::ChunkStore::root(cache_salt), anchor, tokens);
  return between_steps(self, [&](engine::Engine& engine) { return engine.chunks().find(wanted); });
}

int num_cached(ModelEngine& self, const std::vector<TokenId>& tokens, const std::string& cache_salt) {
  return between_steps(self, [&](engine::Engine& engine) { return engine.num_cached(tokens, cache_salt); });
}

// The chunks of one namespace.
py::list list_chunks(ModelEngine& self, const std::string& cache_salt) {
  const kv::PrefixRoot root = kv::ChunkStore::root(cache_salt);
  const auto found = between_steps(self, [&](engine::Engine& engine) {
    std::vector<kv::Chunk> chunks;
    for (const auto& [id, chunk] : engine.chunks().chunks()) {
      if (chunk.root == root && !chunk.is_removed) chunks.push_back(chunk);
    }
    return chunks;
  });
  py::list out;
  std::unordered_set<BlockId> seen;
  for (const kv::Chunk& chunk : found) {
    py::dict item;
    const auto own = chunk.tokens.begin() + chunk.anchor_len;
    item["id"] = chunk.id;
    item["anchor_token_ids"] = std::vector<TokenId>(chunk.tokens.begin(), own);
    item["token_ids"] = std::vector<TokenId>(own, chunk.tokens.end());
    item["ready"] = chunk.is_ready;
    item["pinned"] = chunk.is_pinned;
    item["users"] = chunk.num_users;
    item["hits"] = chunk.num_hits;
    item["blocks"] = chunk.num_blocks();
    item["shared_blocks"] = std::count_if(chunk.blocks.begin(), chunk.blocks.end(),
                                          [&](BlockId block) { return !seen.insert(block).second; });
    out.append(std::move(item));
  }
  return out;
}

RequestId submit(ModelEngine& self, std::shared_ptr<engine::Outbox> outbox, std::vector<TokenId> prompt, int max_tokens,
                 double temperature, int top_k, double top_p, double min_p, double repetition_penalty,
                 std::optional<std::uint64_t> seed, bool ignore_eos, std::vector<TokenId> stop_token_ids,
                 const std::map<TokenId, double>& logit_bias, double presence_penalty, double frequency_penalty,
                 int min_tokens, std::vector<std::vector<TokenId>> bad_words_token_ids,
                 std::optional<std::vector<TokenId>> allowed_token_ids, std::optional<int> logprobs,
                 std::optional<int> prompt_logprobs, bool prompt_logits, std::string cache_salt, int n,
                 const FileTokenizer* stop_tokenizer, std::vector<std::string> stop, double timeout_seconds,
                 const py::object& guided, bool streams,
                 const std::vector<std::tuple<int, int, std::vector<TokenId>>>& chunks, const std::string& reuse,
                 bool mask_sink, double ratio, const std::string& select, bool only_chunks, bool pin_chunks,
                 const KeyPolicyOption& key_policy, std::optional<bool> speculative) {
  engine::Request request;
  request.prompt = std::move(prompt);
  request.max_tokens = max_tokens;
  request.sampling.temperature = temperature;
  request.sampling.top_k = top_k;
  request.sampling.top_p = top_p;
  request.sampling.min_p = min_p;
  request.sampling.repetition_penalty = repetition_penalty;
  request.sampling.presence_penalty = presence_penalty;
  request.sampling.frequency_penalty = frequency_penalty;
  request.sampling.min_tokens = min_tokens;
  request.sampling.bad_words_token_ids = std::move(bad_words_token_ids);
  request.sampling.allowed_token_ids = std::move(allowed_token_ids);
  request.sampling.logprobs = logprobs;
  request.sampling.seed = seed;
  for (const auto& [token, bias] : logit_bias) request.sampling.logit_bias.push_back({token, bias});
  request.ignore_eos = ignore_eos;
  request.stop_token_ids = std::move(stop_token_ids);
  request.prompt_logprobs = prompt_logprobs;
  request.prompt_logits = prompt_logits;
  request.cache_salt = std::move(cache_salt);
  request.n = n;
  request.timeout_seconds = timeout_seconds;
  request.streams = streams;
  for (const auto& [begin, count, anchor] : chunks) request.chunks.push_back({begin, count, anchor});
  request.reuse = {
      .mode = parse_mode(reuse), .mask_sink = mask_sink, .ratio = ratio, .selection = parse_selection(select)};
  request.only_chunks = only_chunks;
  request.pin_chunks = pin_chunks;
  set_policy(request, key_policy);
  request.speculative = speculative;
  if (!stop.empty()) {
    NB_CHECK(stop_tokenizer != nullptr, invalid_argument, "stop strings need a tokenizer");
    const StopRules rules{.stops = std::move(stop), .min_tokens = min_tokens};
    const bool at_start = guided.is_none();  // a grammar counts the space that a text would begin without
    request.make_monitor = [tokenizer = stop_tokenizer->tokenizer, at_start, rules] {
      return std::make_unique<StopMonitor>(tokenizer, at_start, rules);
    };
  }
  request.make_constraint = constraint_maker(guided);
  const py::gil_scoped_release release;
  return self.engine.submit(std::move(request), std::move(outbox));
}

py::dict stats_of(const ModelEngine& self) {
  engine::EngineStats stats;
  {
    const py::gil_scoped_release release;
    stats = self.engine.stats();
  }
  return to_dict(stats);
}

// The array keeps the engine's buffer alive instead of copying it.
py::object logits_of(const engine::StepOutput& output) {
  if (!output.prompt_logits) return py::none();
  auto* owner = new Buffer(output.prompt_logits);
  const py::capsule capsule(owner, [](void* pointer) { delete static_cast<Buffer*>(pointer); });
  const auto rows = static_cast<py::ssize_t>(output.num_prompt_tokens - output.first_logits);
  const auto cols = static_cast<py::ssize_t>(owner->bytes() / sizeof(float)) / rows;
  return py::array_t<float>({rows, cols}, owner->as<float>(), capsule);
}

// Rows of `stride` entries as lists of (token, logprob, rank), without the entries that name no token.
py::object logprob_rows(const std::vector<sampling::TokenLogprob>& entries, std::size_t num_rows) {
  if (entries.empty()) return py::none();
  const std::size_t stride = entries.size() / num_rows;
  py::list rows;
  for (std::size_t row = 0; row < num_rows; ++row) {
    py::list items;
    for (const sampling::TokenLogprob& entry : std::span(entries).subspan(row * stride, stride)) {
      if (entry.token == sampling::TokenLogprob::kNone) continue;
      items.append(py::make_tuple(entry.token, entry.logprob, entry.rank));
    }
    rows.append(std::move(items));
  }
  return rows;
}

py::object prompt_logprobs_of(const engine::StepOutput& output) {
  return logprob_rows(output.prompt_logprobs, static_cast<std::size_t>(output.num_prompt_tokens) - 1);
}

py::object error_of(const engine::StepOutput& output) {
  if (output.error.empty()) return py::none();
  return py::make_tuple(to_string(output.error_code), output.error);
}

py::object finish_of(const engine::StepOutput& output) {
  if (output.finish_reason == engine::FinishReason::none) return py::none();
  return py::str(to_string(output.finish_reason));
}

// Most outputs are one token of the only answer: a list is made faster than an object and its properties are read.
bool is_brief(const engine::StepOutput& output) {
  return output.finish_reason == engine::FinishReason::none && output.choice == 0 && output.error.empty() &&
         output.logprobs.empty() && output.prompt_logprobs.empty() && !output.prompt_logits;
}

py::list wait_brief(engine::Outbox& self, double seconds) {
  std::vector<engine::StepOutput> outputs;
  {
    const py::gil_scoped_release release;
    outputs = self.wait(engine::Outbox::Seconds(seconds));
  }
  py::list out(outputs.size());
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    const auto request_id = outputs[i].request_id;
    py::object what = is_brief(outputs[i]) ? py::cast(outputs[i].token_ids) : py::cast(std::move(outputs[i]));
    out[i] = py::make_tuple(request_id, std::move(what));
  }
  return out;
}

}  // namespace

void bind_engine(py::module_& module) {
  py::class_<engine::StepOutput>(module, "StepOutput")
      .def_property_readonly("request_id", [](const engine::StepOutput& self) { return self.request_id; })
      .def_property_readonly("choice", [](const engine::StepOutput& self) { return self.choice; })
      .def_property_readonly("token_ids", [](const engine::StepOutput& self) { return self.token_ids; })
      .def_property_readonly("finish_reason", &finish_of)
      .def_property_readonly("error", &error_of)
      .def_property_readonly(
          "logprobs", [](const engine::StepOutput& self) { return logprob_rows(self.logprobs, self.token_ids.size()); })
      .def_property_readonly("prompt_logprobs", &prompt_logprobs_of)
      .def_property_readonly("prompt_logits", &logits_of)
      .def_property_readonly("num_prompt_tokens", [](const engine::StepOutput& self) { return self.num_prompt_tokens; })
      .def_property_readonly("num_cached_tokens", [](const engine::StepOutput& self) { return self.num_cached_tokens; })
      .def_property_readonly("reuse", &reuse_of)
      .def_property_readonly("metrics", &metrics_of);

  using engine::Outbox;
  py::class_<Outbox, std::shared_ptr<Outbox>>(module, "Outbox")
      .def(py::init([](bool wake_each_step) {
             return std::make_shared<Outbox>(wake_each_step ? Outbox::Wake::each_step : Outbox::Wake::ends);
           }),
           py::kw_only(), py::arg("wake_each_step") = true)
      .def(
          "wait", [](Outbox& self, double seconds) { return self.wait(Outbox::Seconds(seconds)); }, py::arg("seconds"),
          py::call_guard<py::gil_scoped_release>())
      .def("wait_brief", &wait_brief, py::arg("seconds"))
      .def(
          "wait_for_ends", [](Outbox& self, double seconds) { return self.wait_for_ends(Outbox::Seconds(seconds)); },
          py::arg("seconds"), py::call_guard<py::gil_scoped_release>())
      .def("close", &Outbox::close, py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("closed", &Outbox::closed)
      .def_property_readonly("num_unfinished", &Outbox::num_unfinished);

  py::class_<ModelEngine, EngineHolder>(module, "Engine")
      .def(py::init(&make_engine), py::arg("model"), py::kw_only(), py::arg("kv_dtype") = "auto",
           py::arg("max_model_len") = 0, py::arg("max_num_seqs") = 16, py::arg("max_batch_tokens") = 512,
           py::arg("max_waiting") = 0, py::arg("kv_cache_bytes") = 0, py::arg("enable_prefix_caching") = true,
           py::arg("trace_path") = "", py::arg("kv_store_path") = "", py::arg("kv_store_bytes") = 0,
           py::arg("speculative") = py::none(), py::arg("draft_model") = py::none(), py::arg("enforce_eager") = false)
      .def("submit", &submit, py::arg("outbox"), py::arg("prompt_token_ids"), py::kw_only(), py::arg("max_tokens"),
           py::arg("temperature"), py::arg("top_k"), py::arg("top_p"), py::arg("min_p"), py::arg("repetition_penalty"),
           py::arg("seed").none(true), py::arg("ignore_eos"), py::arg("stop_token_ids"), py::arg("logit_bias"),
           py::arg("presence_penalty") = 0.0, py::arg("frequency_penalty") = 0.0, py::arg("min_tokens") = 0,
           py::arg("bad_words_token_ids") = std::vector<std::vector<TokenId>>{},
           py::arg("allowed_token_ids") = py::none(), py::arg("logprobs") = py::none(),
           py::arg("prompt_logprobs") = py::none(), py::arg("prompt_logits") = false, py::arg("cache_salt") = "",
           py::arg("n") = 1, py::arg("stop_tokenizer") = py::none(), py::arg("stop") = std::vector<std::string>{},
           py::arg("timeout_seconds") = 0.0, py::arg("guided") = py::none(), py::arg("streams") = true,
           py::arg("chunks") = std::vector<std::tuple<int, int, std::vector<TokenId>>>{}, py::arg("reuse") = "exact",
           py::arg("mask_sink") = true, py::arg("ratio") = 0.15, py::arg("select") = "deviation",
           py::arg("only_chunks") = false, py::arg("pin_chunks") = false,
           py::arg("key_policy") = KeyPolicyOption{"full", 0, 1, 0, 0}, py::arg("speculative") = py::none())
      .def("num_cached", &num_cached, py::arg("token_ids"), py::arg("cache_salt") = "")
      .def("find_chunk", &find_chunk, py::arg("token_ids"), py::arg("anchor_token_ids"), py::arg("cache_salt") = "")
      .def("list_chunks", &list_chunks, py::arg("cache_salt") = "")
      .def(
          "remove_chunk",
          [](ModelEngine& self, kv::ChunkId id) {
            return between_steps(self, [&](engine::Engine& engine) { return engine.remove_chunk(id); });
          },
          py::arg("id"))
      .def(
          "pin_chunk",
          [](ModelEngine& self, kv::ChunkId id, bool pinned) {
            return between_steps(self, [&](engine::Engine& engine) { return engine.pin_chunk(id, pinned); });
          },
          py::arg("id"), py::arg("pinned"))
      .def(
          "cancel", [](ModelEngine& self, RequestId id) { self.engine.cancel(id); }, py::arg("request_id"),
          py::call_guard<py::gil_scoped_release>())
      .def(
          "cancel_all", [](ModelEngine& self, const Outbox& outbox) { self.engine.cancel_all(outbox); },
          py::arg("outbox"), py::call_guard<py::gil_scoped_release>())
      .def(
          "hold", [](ModelEngine& self) { self.engine.hold(); }, py::call_guard<py::gil_scoped_release>())
      .def(
          "release", [](ModelEngine& self) { self.engine.release(); }, py::call_guard<py::gil_scoped_release>())
      .def(
          "drain", [](ModelEngine& self, double seconds) { return self.engine.drain(Outbox::Seconds(seconds)); },
          py::arg("seconds"), py::call_guard<py::gil_scoped_release>())
      .def(
          "close", [](ModelEngine& self) { self.engine.close(); }, py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("is_this_thread", [](const ModelEngine& self) { return self.engine.is_this_thread(); })
      .def("stats", &stats_of)
      .def_property_readonly("kv_dtype",
                             [](const ModelEngine& self) { return quant::to_string(*self.engine.options().kv_format); })
      .def_property_readonly("max_model_len",
                             [](const ModelEngine& self) { return self.engine.options().max_model_len; })
      .def_property_readonly("eos_token_ids", [](const ModelEngine& self) { return self.engine.options().eos_ids; });
}

}  // namespace nb::bindings
