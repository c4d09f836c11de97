// Threads that bring mapped pages into memory before they are needed.
#pragma once

#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <span>
#include <thread>
#include <vector>

namespace keyfold::store {

class Prefetcher {
 public:
  /// What has been asked for together.
  class Batch {
   private:
    friend class Prefetcher;
    std::size_t left_ = 0;
  };

  /// Starts the threads at the first request.
  explicit Prefetcher(int num_threads) : num_threads_(num_threads) {}
  ~Prefetcher();
  Prefetcher(const Prefetcher&) = delete;
  Prefetcher& operator=(const Prefetcher&) = delete;

  /// Asks for these ranges of pages, behind what was asked for before.
  void request(Batch& batch, std::span<const std::span<std::byte>> parts);
  /// Returns when the threads are done with the batch: its pages are there, unless memory is short
  /// or the file was truncated.
  void wait(Batch& batch);
  /// The batch's memory may be unmapped when this returns: what has not begun does not begin.
  void cancel(Batch& batch);

 private:
  struct Job {
    Batch* batch;
    std::span<std::byte> pages;
  };
  void work();

  int num_threads_;
  std::mutex mutex_;
  std::condition_variable wanted_, done_;
  std::deque<Job> jobs_;
  bool stopping_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace keyfold::store
