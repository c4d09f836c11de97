// A queue of parts to load, and threads that do.
#include "store/prefetcher.hpp"

#include <algorithm>

namespace keyfold::store {
namespace {

constexpr std::size_t kJobBytes = std::size_t{4} << 20;

}  // namespace

Prefetcher::~Prefetcher() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  wanted_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void Prefetcher::request(Batch& batch, const Window& window) {
  {
    const std::lock_guard lock(mutex_);
    for (Window::Part rest : window.parts()) {
      while (!rest.pages.empty()) {
        const std::size_t bytes = std::min(rest.pages.size(), kJobBytes);
        jobs_.push_back({&batch, &window, {rest.offset, rest.pages.first(bytes)}});
        batch.left_ += 1;
        rest = {rest.offset + static_cast<std::int64_t>(bytes), rest.pages.subspan(bytes)};
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
  if (batch.error_) std::rethrow_exception(batch.error_);
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
    std::exception_ptr error;
    try {
      job.window->load(job.part);
    } catch (...) {
      error = std::current_exception();
    }
    lock.lock();
    if (error) job.batch->error_ = error;
    if (--job.batch->left_ == 0) done_.notify_all();
  }
}

}  // namespace keyfold::store
