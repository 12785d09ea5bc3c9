// rope.cpp against the functions of transformers 5.23 (ROPE_INIT_FUNCTIONS, in float32), whose results stand here.
#include "model/rope.h"

#include <gtest/gtest.h>

#include <cmath>

#include "io/expect_error.h"

namespace nb::model {
namespace {

using io::test::expect_error;

struct Case {
  const char* name;
  int head_dim;
  RopeFacts (*facts)();
  double magnitude;
  std::vector<double> frequencies;
};

const Case kCases[] = {
    {"linear",
     32,
     [] { return RopeFacts{.theta = 10000.0, .scaling = RopeScaling::linear, .factor = 2.5}; },
     1.0,
     {0.400000006, 0.22493653, 0.1264911, 0.0711311772, 0.0399999991, 0.0224936511, 0.0126491114, 0.00711311772,
      0.00399999972, 0.00224936521, 0.00126491114, 0.000711311761, 0.000400000019, 0.000224936521, 0.000126491112,
      7.11311732e-05}},
    {"llama3 of Llama-3.2-1B",
     64,
     [] {
       return RopeFacts{.theta = 500000.0,
                        .scaling = RopeScaling::llama3,
                        .factor = 32.0,
                        .original_context = 8192,
                        .low_freq_factor = 1.0,
                        .high_freq_factor = 4.0};
     },
     1.0,
     {1,
      0.663601279,
      0.440366626,
      0.292227834,
      0.193922758,
      0.128687382,
      0.0853971019,
      0.0566696189,
      0.0376060307,
      0.0249554086,
      0.0165604409,
      0.0109895291,
      0.00729266508,
      0.00483942125,
      0.00321144611,
      0.00129054801,
      0.000429556705,
      9.70828623e-05,
      1.94616387e-05,
      1.29147675e-05,
      8.57025589e-06,
      5.68723226e-06,
      3.77405445e-06,
      2.50446715e-06,
      1.66196742e-06,
      1.10288363e-06,
      7.31874934e-07,
      4.85673127e-07,
      3.22293289e-07,
      2.1387423e-07,
      1.41927202e-07,
      9.41830649e-08}},
    {"llama3 of another shape",
     32,
     [] {
       return RopeFacts{.theta = 10000.0,
                        .scaling = RopeScaling::llama3,
                        .factor = 8.0,
                        .original_context = 64,
                        .low_freq_factor = 1.5,
                        .high_freq_factor = 5.0};
     },
     1.0,
     {1, 0.562341332, 0.175590962, 0.0360697582, 0.0125000002, 0.0070292661, 0.00395284733, 0.00222284929,
      0.00124999997, 0.000702926656, 0.000395284733, 0.000222284929, 0.000125000006, 7.02926627e-05, 3.95284733e-05,
      2.22284925e-05}},
    {"yarn of Qwen2.5 at 131072",
     64,
     [] {
       return RopeFacts{.theta = 1000000.0, .scaling = RopeScaling::yarn, .factor = 4.0, .original_context = 32768};
     },
     1.138629436111989,
     {1,
      0.649381638,
      0.421696514,
      0.273841977,
      0.177827939,
      0.115478203,
      0.0749894157,
      0.0486967526,
      0.0316227786,
      0.0205352511,
      0.0133352149,
      0.00865964312,
      0.00515479548,
      0.0030431177,
      0.00177853031,
      0.00102661771,
      0.000583333371,
      0.000324690831,
      0.000175706868,
      9.12806499e-05,
      4.44569851e-05,
      2.88695483e-05,
      1.87473561e-05,
      1.21741887e-05,
      7.90569356e-06,
      5.13381246e-06,
      3.33380353e-06,
      2.16491094e-06,
      1.40585337e-06,
      9.1293532e-07,
      5.92843435e-07,
      3.84981632e-07}},
    {"yarn without rounding, other betas",
     32,
     [] {
       return RopeFacts{.theta = 10000.0,
                        .scaling = RopeScaling::yarn,
                        .factor = 8.0,
                        .original_context = 64,
                        .beta_fast = 16.0,
                        .beta_slow = 2.0,
                        .truncate = false};
     },
     1.2079441541679836,
     {1, 0.388342232, 0.120533988, 0.0222284924, 0.0125000002, 0.0070292661, 0.00395284733, 0.00222284929,
      0.00124999997, 0.000702926656, 0.000395284733, 0.000222284929, 0.000125000006, 7.02926627e-05, 3.95284733e-05,
      2.22284925e-05}},
    {"yarn with its own magnitude",
     32,
     [] {
       return RopeFacts{
           .theta = 10000.0, .scaling = RopeScaling::yarn, .factor = 16.0, .original_context = 64, .magnitude = 0.75};
     },
     0.75,
     {1, 0.456902325, 0.197642356, 0.0777997151, 0.0250000004, 0.00351463305, 0.00197642366, 0.00111142464,
      0.000624999986, 0.000351463328, 0.000197642366, 0.000111142464, 6.2500003e-05, 3.51463314e-05, 1.97642366e-05,
      1.11142463e-05}},
    {"yarn whose ramp is empty",
     16,
     [] { return RopeFacts{.theta = 5000.0, .scaling = RopeScaling::yarn, .factor = 4.0, .original_context = 4}; },
     1.138629436111989,
     {1, 0.0862122104, 0.0297301784, 0.0102524171, 0.00353553402, 0.00121922465, 0.000420448196, 0.000144991063}},
    {"yarn that shrinks",
     16,
     [] { return RopeFacts{.theta = 5000.0, .scaling = RopeScaling::yarn, .factor = 0.5, .original_context = 256}; },
     1.0,
     {1, 0.431061029, 0.17838107, 0.0717669204, 0.0282842722, 0.0097537972, 0.00336358557, 0.00115992851}},
};

TEST(Rope, FrequenciesAndMagnitudeAreThoseOfTransformers) {
  for (const Case& item : kCases) {
    SCOPED_TRACE(item.name);
    validate(item.facts(), item.head_dim);
    const std::vector<double> actual = rope_frequencies(item.facts(), item.head_dim);
    ASSERT_EQ(actual.size(), item.frequencies.size());
    for (std::size_t i = 0; i < actual.size(); ++i) {
      EXPECT_NEAR(actual[i] / item.frequencies[i], 1.0, 1e-6) << "pair " << i;  // theirs are float32
    }
    EXPECT_DOUBLE_EQ(rope_magnitude(item.facts()), item.magnitude);
  }
}

TEST(Rope, DivisorsDivide) {
  const RopeFacts plain{.theta = 5000.0};
  const RopeFacts divided{.theta = 5000.0, .divisors = {1.0f, 2.0f, 4.0f, 0.5f}};
  validate(divided, 8);
  const std::vector<double> actual = rope_frequencies(divided, 8), expected = rope_frequencies(plain, 8);
  for (std::size_t i = 0; i < 4; ++i) {
    EXPECT_DOUBLE_EQ(expected[i], std::pow(5000.0, -static_cast<double>(i) / 4.0));
    EXPECT_DOUBLE_EQ(actual[i] * static_cast<double>(divided.divisors[i]), expected[i]);
  }
}

// The table is made by the addition theorem; the oracle is one cosine and one sine per entry.
TEST(Rope, TableIsTheCosineOfEveryAngle) {
  for (const Case& item : kCases) {
    SCOPED_TRACE(item.name);
    const int dim = item.head_dim, positions = 1800;
    const Buffer table = make_rope_table(item.facts(), dim, positions);
    const std::vector<double> frequencies = rope_frequencies(item.facts(), dim);
    double worst = 0.0;
    for (int p = 0; p < positions; ++p) {
      const float* row = table.as<const float>() + p * dim;
      for (int i = 0; i < dim / 2; ++i) {
        const double angle = p * frequencies[static_cast<std::size_t>(i)];
        worst = std::max(worst, std::fabs(static_cast<double>(row[i]) - item.magnitude * std::cos(angle)));
        worst = std::max(worst, std::fabs(static_cast<double>(row[dim / 2 + i]) - item.magnitude * std::sin(angle)));
      }
    }
    EXPECT_LE(worst, 6.1e-8 * item.magnitude * 2);  // half a unit in the last place of f32, two binades at most
  }
}

TEST(Rope, TableIsExactAtLongContexts) {
  const RopeFacts facts{.theta = 500000.0};
  const int positions = 131072, dim = 16;
  const Buffer table = make_rope_table(facts, dim, positions);
  const std::vector<double> frequencies = rope_frequencies(facts, dim);
  for (const int p : {8191, 65537, 131071}) {
    for (int i = 0; i < dim / 2; ++i) {
      EXPECT_NEAR(table.as<const float>()[p * dim + i], std::cos(p * frequencies[static_cast<std::size_t>(i)]), 6.1e-8);
    }
  }
}

TEST(Rope, RefusesFactsThatMakeNoSense) {
  const auto refuses = [](RopeFacts facts, const char* piece, ErrorCode code = ErrorCode::format) {
    expect_error(
        code, [&] { validate(facts, 8); }, piece);
  };
  refuses({.theta = 1.0}, "rope_theta");
  refuses({.scaling = RopeScaling::linear, .factor = 0.0}, "factor");
  refuses({.scaling = RopeScaling::linear, .factor = std::nan("")}, "factor");
  refuses({.scaling = RopeScaling::yarn, .factor = 2.0}, "original_context_length");
  refuses({.scaling = RopeScaling::yarn, .factor = 2.0, .original_context = 8, .beta_fast = 0.0}, "beta_fast");
  refuses({.scaling = RopeScaling::yarn, .factor = 2.0, .original_context = 8, .beta_slow = -1.0}, "beta_slow");
  refuses({.scaling = RopeScaling::yarn, .factor = 2.0, .original_context = 8, .magnitude = 0.0}, "attention factor");
  refuses({.scaling = RopeScaling::llama3, .factor = 2.0, .original_context = 8, .low_freq_factor = 4.0}, "below");
  refuses({.divisors = {1.0f, 2.0f}}, "2 frequency divisors for 4 pairs");
  refuses({.divisors = {1.0f, 0.0f, 1.0f, 1.0f}}, "divisor");
  refuses({.scaling = RopeScaling::linear, .factor = 2.0, .divisors = {1.0f, 1.0f, 1.0f, 1.0f}}, "linear",
          ErrorCode::unsupported);
}

}  // namespace
}  // namespace nb::model
