// The identity of a model by the bytes of its files, never by their names: what KV on disk must not outlive.
//
// A digest is remembered beside what the system says of the file (device, inode, size, times of modification and of
// change), so that a large file is read once and not at every start. Not for damage (ModelSource::verify). A file that
// is replaced between opening a model and asking is another file: ask before opening and again after. Safe from any
// thread and in several processes.
#pragma once

#include <string>

#include "base/sha256.h"
#include "io/model_source.h"
#include "io/progress.h"

namespace nb::io {

/// SHA-256 of the file's content. `cache_directory`, if it is not empty and can be written, remembers it in a small
/// file; whatever is wrong there, the content is read. Throws io naming the path if the file cannot be read or changes
/// meanwhile.
Digest file_digest(const std::string& path, const std::string& cache_directory = {},
                   const ProgressFunction& progress = {});

/// The identity of all files of a model: weights, metadata and tokenizer. Reads the files even if they carry a
/// fingerprint, which an edited file keeps. `progress` counts over all of them.
Digest model_digest(const ModelSource& source, const std::string& cache_directory = {},
                    const ProgressFunction& progress = {});

}  // namespace nb::io
