#include "store/prefetcher.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>

namespace keyfold::store {
namespace {

constexpr std::size_t kJobBytes = std::size_t{4} << 20;
constexpr int kPopulateRead = 22;  // MADV_POPULATE_READ of Linux 5.14, which older headers lack

/// Reads the pages in and enters them into the page table. A failure does not matter here: who
/// reads the pages meets it again.
void populate(std::span<std::byte> pages) {
  while (::madvise(pages.data(), pages.size(), kPopulateRead) != 0) {
    if (errno == EINTR) continue;
    if (errno == EINVAL) ::madvise(pages.data(), pages.size(), MADV_WILLNEED);
    return;
  }
}

}  // namespace

Prefetcher::~Prefetcher() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  wanted_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void Prefetcher::request(Batch& batch, std::span<const std::span<std::byte>> parts) {
  {
    const std::lock_guard lock(mutex_);
    for (std::span<std::byte> rest : parts) {
      while (!rest.empty()) {
        const std::size_t bytes = std::min(rest.size(), kJobBytes);
        jobs_.push_back({&batch, rest.first(bytes)});
        batch.left_ += 1;
        rest = rest.subspan(bytes);
      }
    }
    while (threads_.size() < static_cast<std::size_t>(num_threads_)) {
      threads_.emplace_back([this] { work(); });
    }
  }
  wanted_.notify_all();
}

void Prefetcher::wait(Batch& batch) {
  std::unique_lock lock(mutex_);
  done_.wait(lock, [&] { return batch.left_ == 0; });
}

void Prefetcher::cancel(Batch& batch) {
  std::unique_lock lock(mutex_);
  batch.left_ -= std::erase_if(jobs_, [&](const Job& job) { return job.batch == &batch; });
  done_.wait(lock, [&] { return batch.left_ == 0; });
}

void Prefetcher::work() {
  std::unique_lock lock(mutex_);
  for (;;) {
    wanted_.wait(lock, [&] { return stopping_ || !jobs_.empty(); });
    if (stopping_) return;
    const Job job = jobs_.front();
    jobs_.pop_front();
    lock.unlock();
    populate(job.pages);
    lock.lock();
    if (--job.batch->left_ == 0) done_.notify_all();
  }
}

}  // namespace keyfold::store
