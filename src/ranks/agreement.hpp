// What all ranks must have in common before they exchange anything else, and how a failure on one
// reaches the others.
#pragma once

#include <cstdint>
#include <exception>
#include <string>
#include <string_view>
#include <vector>

#include "ranks/channel.hpp"

namespace keyfold::ranks {

/// Something that must be equal on all ranks, as text.
struct Field {
  std::string name, value;
};

/// What each rank has of its own, by rank.
struct Shares {
  std::vector<std::int64_t> kv_len, q_len;
};

/// The same on every machine.
std::uint64_t digest_of(std::string_view text);

/// Compares the fields and gathers the shares. With `failure`, the others learn of it. Throws that,
/// InvalidArgument that names the first field that differs and who has what, or PeerError.
Shares agree(Channel& channel, const std::vector<Field>& fields, std::int64_t kv_len,
             std::int64_t q_len, const std::exception_ptr& failure);

/// Throws `failure`, where this rank failed, and else PeerError with what the others say of theirs.
/// At least one rank has failed, all call this, and nothing is under way.
[[noreturn]] void throw_failure(Channel& channel, const std::exception_ptr& failure);

}  // namespace keyfold::ranks
