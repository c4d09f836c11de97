// keyfold store: what a store of keys and values holds, whether it is sound, and adding to it.
#include <fmt/format.h>

#include <filesystem>
#include <keyfold/kv_store.hpp>
#include <memory>

#include "command.hpp"
#include "numbers.hpp"
#include "progress.hpp"

namespace keyfold::cli {
namespace {

class StoreCommand : public Command {
 public:
  CLI::App* add_to(CLI::App& app) override {
    CLI::App* command = app.add_subcommand(
        "store", "Show, check or extend a file of a conversation's keys and values");
    command->require_subcommand(1);
    command->add_flag("--json", json_, "Print one JSON document on stdout instead of text");
    const auto add = [&](const char* name, const char* help) {
      CLI::App* sub = command->add_subcommand(name, help);
      sub->add_option("STORE", path_, "The file")->required()->type_name("");
      sub->fallthrough();
      return sub;
    };
    add("info", "Show what it holds");
    verify_ = add("verify", "Read all of it and compare all checksums");
    append_ = add("append", "Append keys and values from files; make the store if it isn't there");
    append_->add_option("--k", k_, "Keys, [batch, num_kv_heads, n, head_dim]")
        ->required()
        ->type_name("FILE");
    append_->add_option("--v", v_, "Values, [batch, num_kv_heads, n, value_dim]")
        ->required()
        ->type_name("FILE");
    append_->add_option("--layout", layout_, "Axes of k and v: bhld or blhd")
        ->check(CLI::IsMember({"bhld", "blhd"}))
        ->type_name("AXES")
        ->capture_default_str();
    append_->add_flag("--no-progress", no_progress_, "No progress bar, even on a terminal");
    command->footer(
        "FILE is PATH.npy, PATH.safetensors or PATH.safetensors:TENSOR. A closed store is a "
        "safetensors file itself. What an interrupted writer left unfinished is dropped by the "
        "next 'append', and said before by 'info'.\n\nExamples:\n"
        "  keyfold store append chat.kv --k k.npy --v v.npy\n"
        "  keyfold store verify chat.kv\n"
        "  keyfold attend --q q.npy --kv chat.kv --out out.npy");
    return command;
  }

  ExitCode run(const Context& context) override {
    if (append_->parsed()) append(context);
    const KvStore store = KvStore::open(path_);
    std::optional<VerifyReport> verified;
    if (verify_->parsed()) verified = store.verify();
    if (json_)
      print_json(as_json(store, verified));
    else
      print(store, verified);
    return kOk;
  }

 private:
  void append(const Context& context) const {
    const auto source = open_source(k_, v_, layout_ == "blhd" ? Axes::kBLHD : Axes::kBHLD);
    KvStore store = std::filesystem::exists(path_)
                        ? KvStore::append_to(path_, Durability::kProcess)
                        : KvStore::create(path_, source->shape(), {}, Durability::kProcess);
    ProgressBar bar(context.terminal && !no_progress_, "append");
    const std::int64_t all = source->size();
    source->seek(0, all);
    for (std::int64_t done = 0; done < all;) {
      check_stop(context.stop_token);
      const KeyValuePiece piece = source->next();
      store.append(piece.k, piece.v);
      done += piece.size();
      bar.update(static_cast<double>(done) / static_cast<double>(all));
    }
    source->release();
    store.close();
  }

  static std::string state_of(const KvStore& store) {
    const RecoveryReport& found = store.recovery();
    if (found.closed) return "closed, or being written";
    return fmt::format("not closed; unfinished and dropped: {} keys, {}", found.dropped_keys,
                       readable_bytes(found.dropped_bytes));
  }

  void print(const KvStore& store, const std::optional<VerifyReport>& verified) const {
    const KeyValueShape& s = store.shape();
    fmt::print("store      {}\n", path_);
    fmt::print("shape      k [{0}, {1}, {2}, {3}], v [{0}, {1}, {2}, {4}], {5}\n", s.batch,
               s.num_kv_heads, store.size(), s.head_dim, s.value_dim, name_of(s.dtype));
    fmt::print("room       {} keys, in blocks of {}\n", store.max_keys(), store.block_len());
    fmt::print("state      {}\n", state_of(store));
    if (verified) {
      fmt::print("verified   {} keys, {}, {} checksums\n", verified->keys,
                 readable_bytes(verified->bytes), verified->records);
    }
  }

  nlohmann::ordered_json as_json(const KvStore& store,
                                 const std::optional<VerifyReport>& verified) const {
    const KeyValueShape& s = store.shape();
    const RecoveryReport& found = store.recovery();
    nlohmann::ordered_json json = {{"store", path_},
                                   {"batch", s.batch},
                                   {"num_kv_heads", s.num_kv_heads},
                                   {"keys", store.size()},
                                   {"head_dim", s.head_dim},
                                   {"value_dim", s.value_dim},
                                   {"dtype", name_of(s.dtype)},
                                   {"block_len", store.block_len()},
                                   {"max_keys", store.max_keys()},
                                   {"closed", found.closed},
                                   {"dropped_keys", found.dropped_keys},
                                   {"dropped_bytes", found.dropped_bytes}};
    if (verified) {
      json["verified"] = {
          {"keys", verified->keys}, {"bytes", verified->bytes}, {"checksums", verified->records}};
    }
    return json;
  }

  CLI::App* verify_ = nullptr;
  CLI::App* append_ = nullptr;
  std::string path_, k_, v_, layout_ = "bhld";
  bool json_ = false, no_progress_ = false;
};

}  // namespace

std::unique_ptr<Command> store_command() { return std::make_unique<StoreCommand>(); }

}  // namespace keyfold::cli
