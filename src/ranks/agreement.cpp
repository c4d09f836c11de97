// A digest for the usual case, texts where something is wrong.
#include "ranks/agreement.hpp"

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>

#include "keyfold/error.hpp"

namespace keyfold::ranks {
namespace {

struct Record {
  std::uint64_t digest = 0;
  std::int64_t kv_len = 0, q_len = 0, failed = 0;
};

using Text = std::array<char, 1024>;

/// Every rank's `mine`.
template <class T>
std::vector<T> gather(Channel& channel, const T& mine, const char* what) {
  struct Buffers {
    T mine;
    std::vector<T> all;
  };
  const auto buffers = std::make_shared<Buffers>(
      Buffers{mine, std::vector<T>(static_cast<std::size_t>(channel.num_ranks()))});
  channel.wait(channel.all_gather(buffers, &buffers->mine, buffers->all.data(), sizeof(T)), what);
  return buffers->all;
}

std::vector<std::string> gather_texts(Channel& channel, std::string_view mine, const char* what) {
  Text text{};
  std::copy_n(mine.data(), std::min(mine.size(), text.size() - 1), text.data());
  std::vector<std::string> texts;
  for (const Text& other : gather(channel, text, what)) texts.emplace_back(other.data());
  return texts;
}

std::string text_of(const std::exception_ptr& failure) {
  if (!failure) return "";
  try {
    std::rethrow_exception(failure);
  } catch (const Error& error) {
    return error.what();
  } catch (const std::exception& error) {
    return error.what();
  } catch (...) {
    return "an exception that is not a std::exception";
  }
}

[[noreturn]] void throw_difference(Channel& channel, const std::vector<Field>& fields) {
  for (const Field& field : fields) {
    const std::vector<std::string> values =
        gather_texts(channel, field.value, "the ranks' arguments");
    const auto other = std::find_if(values.begin(), values.end(),
                                    [&](const std::string& v) { return v != values.front(); });
    if (other == values.end()) continue;
    throw InvalidArgument(field.name, "expected the same on all ranks, got " + values.front() +
                                          " on rank 0 and " + *other + " on rank " +
                                          std::to_string(other - values.begin()));
  }
  throw InvalidArgument("options", "expected the same on all ranks");
}

}  // namespace

/// FNV-1a (Fowler, Noll and Vo), 64 bits.
std::uint64_t digest_of(std::string_view text) {
  std::uint64_t hash = 0xcbf29ce484222325;
  for (const char c : text) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3;
  return hash;
}

Shares agree(Channel& channel, const std::vector<Field>& fields, std::int64_t kv_len,
             std::int64_t q_len, const std::exception_ptr& failure) {
  std::string text;
  for (const Field& field : fields) text += field.name + '=' + field.value + '\n';
  const std::vector<Record> records =
      gather(channel, Record{digest_of(text), kv_len, q_len, failure ? 1 : 0},
             "the other ranks to begin the call");
  Shares shares;
  bool failed = false, same = true;
  for (const Record& record : records) {
    shares.kv_len.push_back(record.kv_len);
    shares.q_len.push_back(record.q_len);
    failed |= record.failed != 0;
    same &= record.digest == records.front().digest;
  }
  if (failed) throw_failure(channel, failure);
  if (!same) throw_difference(channel, fields);
  return shares;
}

void throw_failure(Channel& channel, const std::exception_ptr& failure) {
  const std::vector<std::string> texts =
      gather_texts(channel, text_of(failure), "what failed on other ranks");
  if (failure) std::rethrow_exception(failure);
  std::string message;
  std::vector<int> ranks;
  for (std::size_t rank = 0; rank < texts.size(); ++rank) {
    if (texts[rank].empty()) continue;
    message +=
        (message.empty() ? "rank " : "; rank ") + std::to_string(rank) + " failed: " + texts[rank];
    ranks.push_back(static_cast<int>(rank));
  }
  throw PeerError(message, ranks);
}

}  // namespace keyfold::ranks
