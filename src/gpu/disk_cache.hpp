// Files that keep what compilers made, from process to process.
#pragma once

#include <filesystem>
#include <span>
#include <vector>

namespace keyfold::gpu {

/// KEYFOLD_CACHE_DIR, else keyfold/ in the user's cache folder; empty if there is none.
std::filesystem::path cache_folder();

/// Empty where the file is not there.
std::vector<std::byte> read_file(const std::filesystem::path& file);

/// Puts a file in place in one step, so that no reader meets a half-written one, and makes its
/// folder. That it can't be written is no error.
void replace_file(const std::filesystem::path& file, std::span<const std::byte> data) noexcept;

}  // namespace keyfold::gpu
