// Threads that read what will be needed soon.
#pragma once

#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "store/window.hpp"

namespace keyfold::store {

class Prefetcher {
 public:
  /// What has been asked for together.
  class Batch {
   private:
    friend class Prefetcher;
    std::size_t left_ = 0;
    std::exception_ptr error_;
  };

  /// Starts the threads at the first request.
  explicit Prefetcher(int num_threads) : num_threads_(num_threads) {}
  ~Prefetcher();
  Prefetcher(const Prefetcher&) = delete;
  Prefetcher& operator=(const Prefetcher&) = delete;

  /// Asks for all parts of a window, behind what was asked for before.
  void request(Batch& batch, const Window& window);
  /// Returns when all of the batch is there. Throws what failed.
  void wait(Batch& batch);
  /// The batch's windows may be destroyed when this returns: what has not begun does not begin.
  void cancel(Batch& batch);

 private:
  struct Job {
    Batch* batch;
    const Window* window;
    Window::Part part;
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
