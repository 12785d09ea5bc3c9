// Recognises a chat template and renders conversations with it, for tests that compare with jinja2.
//
// Input: fields, each a length in decimal, a colon and so many bytes: the template; then for each conversation "1" or
// "0" (add_generation_prompt), the number of messages, and role and content of each. Output: a field per conversation,
// "+" and the text, or "-" and the error. Control pieces are between the bytes 1 and 2. With a model file as argument
// the texts are token ids by its tokenizer instead, each with a space behind it.
#include <iostream>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

#include "base/error.h"
#include "io/gguf_tokenizer.h"
#include "io/model_source.h"
#include "text/chat_render.h"
#include "text/tokenizer.h"

namespace {

class Fields {
 public:
  explicit Fields(std::string bytes) : bytes_(std::move(bytes)) {}
  bool done() const { return at_ == bytes_.size(); }
  std::string next() {
    const std::size_t colon = bytes_.find(':', at_);
    const std::size_t length = std::stoul(bytes_.substr(at_, colon - at_));
    at_ = colon + 1 + length;
    return bytes_.substr(colon + 1, length);
  }

 private:
  std::string bytes_;
  std::size_t at_ = 0;
};

nb::text::ChatRole role_of(const std::string& name) {
  using nb::text::ChatRole;
  for (const ChatRole role : {ChatRole::system, ChatRole::user, ChatRole::assistant}) {
    if (name == to_string(role)) return role;
  }
  nb::fail(nb::ErrorCode::invalid_argument, "no role ", name);
}

std::string render(const nb::text::ChatFormat& format, const nb::text::Tokenizer* tokenizer, Fields& in) {
  const bool generate = in.next() == "1";
  std::vector<nb::text::ChatMessage> messages(std::stoul(in.next()));
  for (nb::text::ChatMessage& message : messages) {
    message.role = role_of(in.next());
    message.content = in.next();
  }
  try {
    std::string text = "+";
    const std::vector<nb::text::ChatPiece> pieces = render_chat(format, messages, generate);
    if (tokenizer != nullptr) {
      for (const nb::TokenId id : encode_chat(*tokenizer, pieces)) text += std::to_string(id) + " ";
      return text;
    }
    for (const nb::text::ChatPiece& piece : pieces) {
      text += piece.is_control ? "\1" + piece.text + "\2" : piece.text;
    }
    return text;
  } catch (const nb::Error& error) {
    return nb::concat("-", to_string(error.code()), ": ", error.what());
  }
}

}  // namespace

int main(int argc, char** argv) {
  try {
    Fields in(std::string(std::istreambuf_iterator<char>(std::cin), {}));
    std::unique_ptr<const nb::text::Tokenizer> tokenizer;
    if (argc > 1) tokenizer = nb::io::read_tokenizer(nb::io::open_model(argv[1])->metadata());
    const std::string source = in.next();
    const nb::text::ChatFormat format =
        tokenizer ? nb::text::find_chat_format(source, *tokenizer) : nb::text::find_chat_format(source);
    while (!in.done()) {
      const std::string text = render(format, tokenizer.get(), in);
      std::cout << text.size() << ":" << text;
    }
    return 0;
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 2;
  }
}
