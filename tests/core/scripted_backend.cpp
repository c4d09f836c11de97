// A backend without a device.
#include "core/scripted_backend.hpp"

#include <gtest/gtest.h>

#include <cstring>
#include <deque>

#include "core/half.hpp"
#include "core/registry.hpp"

namespace keyfold::test {

FoldCheck::FoldCheck(const core::Problem& problem, const core::Block& block, core::KeyRange keys,
                     std::int64_t split_len)
    : problem_(&problem), block_(block), keys_(keys), split_len_(split_len) {
  for (std::int64_t g = block.group_begin; g < block.group_end; ++g)
    for (std::int64_t i = block.row_begin; i < block.row_end; ++i)
      states_.push_back({visible(g, i).begin, 0});
}

core::KeyRange FoldCheck::visible(std::int64_t group, std::int64_t row) const {
  return problem_->visible(group / problem_->shape.num_kv_heads, row).clip(keys_);
}

const FoldCheck::State& FoldCheck::state(std::int64_t group, std::int64_t row) const {
  return states_[static_cast<std::size_t>(
      (group - block_.group_begin) * (block_.row_end - block_.row_begin) + row - block_.row_begin)];
}

void FoldCheck::fold(const ChunkBox& box) {
  ASSERT_LE(block_.group_begin, box.group_begin);
  ASSERT_LE(box.group_end, block_.group_end);
  ASSERT_LE(block_.row_begin, box.row_begin);
  ASSERT_LE(box.row_end, block_.row_end);
  ASSERT_LE(keys_.begin, box.key_begin);
  ASSERT_LT(box.key_begin, box.key_end);
  ASSERT_LE(box.key_end, keys_.end);
  ASSERT_EQ(box.key_begin % split_len_, 0);
  for (std::int64_t g = box.group_begin; g < box.group_end; ++g) {
    for (std::int64_t i = box.row_begin; i < box.row_end; ++i) {
      const core::KeyRange all = visible(g, i);
      // A chunk ends at a split's end, or nothing visible is left behind it.
      ASSERT_TRUE(box.key_end % split_len_ == 0 || all.end <= box.key_end);
      const core::KeyRange part = all.clip({box.key_begin, box.key_end});
      if (part.size() == 0) continue;
      State& s = const_cast<State&>(state(g, i));
      ASSERT_EQ(s.next, part.begin) << "group " << g << " row " << i;
      s.next = part.end;
      s.seen += part.size();
    }
  }
}

bool FoldCheck::complete() const {
  for (std::int64_t g = block_.group_begin; g < block_.group_end; ++g)
    for (std::int64_t i = block_.row_begin; i < block_.row_end; ++i)
      if (state(g, i).seen != visible(g, i).size()) return false;
  return true;
}

namespace {

class ScriptedRun : public core::Run {
 public:
  ScriptedRun(ScriptedBackend& backend, const core::Problem& problem, const core::Block& block)
      : script_(backend.script),
        log_(backend.log),
        problem_(problem),
        block_(block),
        fold_(problem, block, {0, problem.shape.kv_len}, backend.script.kernel.split_len),
        kept_(fold_) {
    script_.on_begin(block);
    ++log_.runs_begun;
    log_.most_runs_alive = std::max(log_.most_runs_alive, ++log_.runs_alive);
  }
  ~ScriptedRun() override {
    log_.in_flight -= static_cast<int>(queue_.size());
    --log_.runs_alive;
  }

  void submit(const core::Chunk& chunk, const core::KeySource& source) override {
    const auto index = static_cast<std::int64_t>(log_.chunks.size());
    EXPECT_FALSE(lost_);
    script_.on_source(chunk.box, source);
    on_device([&] { script_.on_submit(index); });
    EXPECT_LE(source.first_key, chunk.box.key_begin);
    EXPECT_LE(chunk.box.key_end, source.first_key + source.k.sizes[2]);
    EXPECT_DOUBLE_EQ(chunk.flops, problem_.visible_pairs(chunk.box) * problem_.flops_per_pair());
    log_.chunks.push_back(chunk);
    log_.seconds.push_back(script_.seconds(index, chunk.flops));
    queue_.push_back(index);
    log_.most_in_flight = std::max(log_.most_in_flight, ++log_.in_flight);
  }

  double wait() override {
    EXPECT_FALSE(lost_);
    const std::int64_t index = queue_.front();
    queue_.pop_front();
    --log_.in_flight;
    ++log_.waited;
    on_device([&] { script_.on_wait(index); });
    fold_.fold(log_.chunks[static_cast<std::size_t>(index)].box);
    return log_.seconds[static_cast<std::size_t>(index)];
  }

  void merge(core::Run&) override { on_device(script_.on_merge); }

  void checkpoint() override {
    EXPECT_FALSE(lost_);
    EXPECT_TRUE(queue_.empty());
    on_device(script_.on_checkpoint);
    ++log_.checkpoints;
    kept_ = fold_;
  }

  void recover() override {
    on_device(script_.on_recover);
    ++log_.recoveries;
    log_.in_flight -= static_cast<int>(queue_.size());
    queue_.clear();
    fold_ = kept_;
    lost_ = false;
  }

  void finish(const MutableTensorView& out, const std::optional<MutableTensorView>& lse) override {
    EXPECT_FALSE(lost_);
    EXPECT_TRUE(queue_.empty());
    EXPECT_TRUE(fold_.complete());
    on_device(script_.on_finish);
    const AttentionShape& s = problem_.shape;
    for (std::int64_t g = block_.group_begin; g < block_.group_end; ++g)
      for (std::int64_t h = 0; h < problem_.group_size(); ++h)
        for (std::int64_t i = block_.row_begin; i < block_.row_end; ++i) {
          const std::int64_t b = g / s.num_kv_heads;
          const std::int64_t head = g % s.num_kv_heads * problem_.group_size() + h;
          const auto seen = static_cast<float>(fold_.seen(g, i));
          for (std::int64_t d = 0; d < s.value_dim; ++d)
            core::store_float(core::element(out, b, head, i, d), out.dtype, seen);
          if (lse) core::store_float(core::element(*lse, b, head, i, 0), DType::kFloat32, seen);
        }
  }

 private:
  /// What the script does in place of a device. Its loss takes the state along.
  template <class Act>
  void on_device(const Act& act) {
    try {
      act();
    } catch (const core::DeviceLost&) {
      lost_ = true;
      fold_ = FoldCheck(problem_, block_, {0, 0}, script_.kernel.split_len);
      throw;
    }
  }

  const Script& script_;
  Log& log_;
  const core::Problem& problem_;
  const core::Block block_;
  FoldCheck fold_, kept_;
  bool lost_ = false;
  std::deque<std::int64_t> queue_;
};

/// Host memory that only upload() and download() reach.
class ScriptedMemory : public core::DeviceMemory {
 public:
  explicit ScriptedMemory(std::int64_t bytes) : data_(static_cast<std::size_t>(bytes)) {}
  void upload(std::int64_t offset, const void* from, std::int64_t bytes) override {
    ASSERT_LE(offset + bytes, static_cast<std::int64_t>(data_.size()));
    std::memcpy(data_.data() + offset, from, static_cast<std::size_t>(bytes));
  }
  void download(std::int64_t offset, void* to, std::int64_t bytes) const override {
    ASSERT_LE(offset + bytes, static_cast<std::int64_t>(data_.size()));
    std::memcpy(to, data_.data() + offset, static_cast<std::size_t>(bytes));
  }

 private:
  std::vector<std::byte> data_;
};

}  // namespace

std::shared_ptr<core::DeviceMemory> ScriptedBackend::allocate(std::int64_t bytes) {
  script.on_allocate(bytes);
  return std::make_shared<ScriptedMemory>(bytes);
}

ScriptedBackend& ScriptedBackend::fresh() {
  static const std::shared_ptr<ScriptedBackend> instance = [] {
    auto made = std::make_shared<ScriptedBackend>();
    core::register_backend(made);
    return made;
  }();
  instance->script = {};
  instance->log = {};
  return *instance;
}

DeviceInfo ScriptedBackend::device() const {
  return {.backend = kName,
          .name = "a script",
          .kernel = "none",
          .kernels = {"none"},
          .max_head_dim = 128,
          .dtypes = {DType::kFloat32, DType::kFloat16, DType::kBFloat16}};
}

std::string ScriptedBackend::unsupported(const core::Problem& problem) const {
  return problem.shape.head_dim <= 128 ? "" : "head_dim is more than 128";
}

std::int64_t ScriptedBackend::scratch_bytes(const core::Problem& problem, std::int64_t groups,
                                            std::int64_t rows, int) const {
  return groups * rows * problem.group_size() * script.bytes_per_row;
}

std::unique_ptr<core::Run> ScriptedBackend::begin(const core::Problem& problem,
                                                  const core::Block& block, int) {
  return std::make_unique<ScriptedRun>(*this, problem, block);
}

}  // namespace keyfold::test
