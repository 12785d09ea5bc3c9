#include "base/sha256.h"

#include <gtest/gtest.h>

#include <string>
#include <string_view>

namespace nb {
namespace {

std::span<const std::byte> bytes_of(std::string_view text) {
  return {reinterpret_cast<const std::byte*>(text.data()), text.size()};
}

std::string sha256(std::string_view text, bool allow_instructions) {
  Sha256 hash(allow_instructions);
  hash.update(bytes_of(text));
  return to_hex(hash.finish());
}

// The examples of FIPS 180-2, appendix B.
TEST(Sha256, KnownAnswers) {
  for (const bool allow : {false, true}) {
    EXPECT_EQ(sha256("", allow), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    EXPECT_EQ(sha256("abc", allow), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    EXPECT_EQ(sha256("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq", allow),
              "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
    EXPECT_EQ(sha256(std::string(1000000, 'a'), allow),
              "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
  }
}

TEST(Sha256, TheInstructionsGiveWhatTheDefinitionGives) {
  std::string text;
  for (int length = 0; length < 300; ++length) {
    ASSERT_EQ(sha256(text, true), sha256(text, false)) << length;
    text += static_cast<char>(length * 37 + length / 5);
  }
}

TEST(Sha256, PiecesGiveTheSameAsTheWhole) {
  const std::string text(1000, 'x');
  for (std::size_t step : {1, 3, 55, 56, 63, 64, 65, 127, 200}) {
    Sha256 hash;
    for (std::size_t at = 0; at < text.size(); at += step)
      hash.update(bytes_of(text).subspan(at).first(std::min(step, text.size() - at)));
    EXPECT_EQ(to_hex(hash.finish()), sha256(text, false)) << step;
  }
}

}  // namespace
}  // namespace nb
