#include "engine/head_runner.h"

#include <gtest/gtest.h>

#include <cmath>

#include "engine/engine_fixture.h"
#include "engine/fake_requests.h"
#include "engine/prompt_scores.h"

namespace nb::engine {
namespace {

/// Runs the first step of `requests` up to the head.
class HeadRunnerTest : public testing::Test {
 protected:
  void run(const std::vector<Request>& requests) {
    RequestId id = 0;
    for (const Request& request : requests) {
      auto sequence = make_sequence(++id, request);
      reserve_prompt_scores(*sequence, kVocab);
      sequences_.push_back(sequence.get());
      scheduler_.submit(std::move(sequence));
    }
    const StepPlan& plan = scheduler_.plan();
    build_batch(plan, scheduler_.chunks(), batch_);
    ops::ExecContext ctx{.kernels = model_->backend().kernels, .pool = &model_->pool(), .workspace = &workspace_};
    kv::KvStorage storage({quant::KvFormat::f32, 2, 2, 16}, 64);
    const Tensor hidden = model_->decoder().forward(batch_.inputs, storage, ctx);
    sampled_.assign(plan.entries.size(), -1);
    head_.run(hidden, batch_, plan, sampled_, ctx, stats_);
    // The oracle: all logits at once.
    const auto rows = batch_.inputs.logit_rows.size();
    logits_.resize(rows * kVocab);
    std::vector<TokenId> argmax(rows);
    model_->decoder().head(hidden, batch_.inputs.logit_rows,
                           Tensor(logits_.data(), DType::f32, {static_cast<std::int64_t>(rows), kVocab}), argmax, ctx);
  }

  TokenId argmax(std::size_t row) const {
    const float* begin = logits_.data() + row * kVocab;
    return static_cast<TokenId>(std::max_element(begin, begin + kVocab) - begin);
  }

  static constexpr int kVocab = 320;
  std::unique_ptr<model::Model> model_ = model::make_tiny_model({.num_threads = 2});
  Workspace workspace_{CachingPool::create()};
  Scheduler scheduler_{{.max_batch_tokens = 512, .max_num_seqs = 40}, 64};
  HeadRunner head_{*model_};
  StepBatch batch_;
  std::vector<Sequence*> sequences_;
  std::vector<TokenId> sampled_;
  std::vector<float> logits_;
  EngineStats stats_;
};

TEST_F(HeadRunnerTest, GreedyRowsNeedNoLogits) {
  std::vector<Request> requests;
  for (unsigned i = 0; i < 40; ++i) requests.push_back(random_request(i, 3, 1));  // two groups
  run(requests);
  EXPECT_EQ(head_.logits_rows(), 0);
  for (std::size_t i = 0; i < 40; ++i) EXPECT_EQ(sampled_[i], argmax(i)) << i;
}

TEST_F(HeadRunnerTest, OneGroupMayNeedLogitsAndAnotherNot) {
  std::vector<Request> requests;
  for (unsigned i = 0; i < 40; ++i) requests.push_back(random_request(i, 3, 1));
  requests[35].sampling.temperature = 1.0;
  requests[35].sampling.top_k = 1;
  requests[36].sampling.logit_bias = {{9, 100.0}};
  run(requests);
  EXPECT_EQ(head_.logits_rows(), 8);
  for (std::size_t i = 0; i < 40; ++i) EXPECT_EQ(sampled_[i], i == 36 ? 9 : argmax(i)) << i;
}

TEST_F(HeadRunnerTest, GreedyWithLogprobsTakesTheSameTokenAndScoresIt) {
  Request request = random_request(1, 3, 1);
  request.sampling.logprobs = 2;
  run({request, random_request(2, 4, 1)});
  EXPECT_EQ(head_.logits_rows(), 2);
  EXPECT_EQ(sampled_[0], argmax(0));
  EXPECT_EQ(sampled_[1], argmax(1));
  const auto& row = sequences_[0]->logprobs;
  ASSERT_EQ(row.size(), 3u);
  EXPECT_EQ(row[0].token, argmax(0));
  EXPECT_EQ(row[0].rank, 1);
  EXPECT_EQ(row[1].token, argmax(0));
  EXPECT_EQ(row[2].rank, 2);
  double total = 0.0;
  for (int v = 0; v < kVocab; ++v) total += std::exp(static_cast<double>(logits_[static_cast<std::size_t>(v)]));
  EXPECT_NEAR(row[0].logprob, static_cast<double>(logits_[static_cast<std::size_t>(argmax(0))]) - std::log(total),
              1e-5);
  EXPECT_TRUE(sequences_[1]->logprobs.empty());
}

TEST_F(HeadRunnerTest, MasksThatLeaveNothingAreTheRequestsOwnError) {
  Request request = random_request(1, 3, 5);
  request.sampling.allowed_token_ids = {4};
  request.sampling.min_tokens = 1;
  request.stop_token_ids = {4};
  run({request, random_request(2, 4, 1)});
  EXPECT_NE(sequences_[0]->error.find("allowed_token_ids and min_tokens"), std::string::npos) << sequences_[0]->error;
  EXPECT_EQ(sampled_[0], -1);
  EXPECT_EQ(sequences_[1]->error, "");
  EXPECT_EQ(sampled_[1], argmax(1));
}

TEST_F(HeadRunnerTest, ScoresOfEveryPromptRowArriveWhereTheyBelong) {
  Request scores = random_request(1, 100, 2);  // four groups
  scores.prompt_logits = true;
  scores.prompt_logprobs = 0;
  run({random_request(2, 5, 1), scores});
  EXPECT_EQ(head_.logits_rows(), HeadRunner::kGroupRows);
  EXPECT_EQ(sampled_[0], argmax(0));
  EXPECT_EQ(sampled_[1], argmax(100));
  const float* kept = sequences_[1]->prompt_logits.as<float>();
  ASSERT_EQ(logits_.size(), 101u * kVocab);
  for (std::size_t i = 0; i < 100u * kVocab; ++i) ASSERT_EQ(kept[i], logits_[kVocab + i]) << i;
  for (std::size_t row = 0; row < 99; ++row) {
    const float* begin = kept + row * kVocab;
    double total = 0.0;
    for (int v = 0; v < kVocab; ++v) total += std::exp(static_cast<double>(begin[v]));
    const TokenId next = sequences_[1]->tokens[row + 1];
    EXPECT_NEAR(sequences_[1]->prompt_logprobs[row].logprob, static_cast<double>(begin[next]) - std::log(total), 1e-5);
  }
}

}  // namespace
}  // namespace nb::engine
