// Survives the loss of mapped memory: a file that is truncated while it is mapped, or can't be
// read.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace keyfold::store {

/// Addresses of a mapping. As long as it lives, a thread that meets a lost page there goes on
/// reading zeros instead of ending the process by SIGBUS, and lost() becomes true: who uses the
/// memory asks for it afterwards. The process's handler of SIGBUS is set once, by the first guard;
/// signals from elsewhere go to the handler that was there before.
class BusGuard {
 public:
  BusGuard(void* begin, std::size_t bytes);
  ~BusGuard();
  BusGuard(const BusGuard&) = delete;
  BusGuard& operator=(const BusGuard&) = delete;

  bool lost() const;

  /// One entry in the list that the handler reads. Entries are reused, and never freed.
  struct Entry {
    std::atomic<bool> used = false;
    std::atomic<std::uintptr_t> begin = 0, end = 0;
    std::atomic<bool> lost = false;
    Entry* next = nullptr;
  };

 private:
  Entry* entry_;
};

}  // namespace keyfold::store
