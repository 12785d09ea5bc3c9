// The keys "<architecture>.*" of a model file, reviewed one by one: read, without effect, or refused unless neutral.
//
// A key nobody has reviewed is refused too: it may say something about the model that would silently be ignored.
// Sources: the keys of the `gguf` package (gguf/constants.py), what llama.cpp reads of them for these architectures,
// and what its converters write. Safe from any thread.
#pragma once

#include <string>

#include "io/metadata.h"

namespace nb::model {

/// Throws unsupported naming key, value and what it stands for, if the file has a key of `architecture` that this
/// engine would ignore although it changes the result.
void refuse_unknown_keys(const io::Metadata& file, const std::string& architecture);

}  // namespace nb::model
