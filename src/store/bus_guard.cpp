// The handler puts zeros in the place of what was lost, as Wayland's servers do with the shared
// memory of clients that they can't trust.
#include "store/bus_guard.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <mutex>

namespace keyfold::store {
namespace {

using Entry = BusGuard::Entry;

static_assert(std::atomic<std::uintptr_t>::is_always_lock_free);

std::atomic<Entry*> entries = nullptr;
struct sigaction previous {};
std::uintptr_t page_bytes = 4096;

Entry* find(std::uintptr_t address) {
  for (Entry* entry = entries; entry != nullptr; entry = entry->next) {
    if (entry->begin <= address && address < entry->end) return entry;
  }
  return nullptr;
}

/// Memory of zeros from the page at `address` to the entry's end.
bool replace(const Entry& entry, std::uintptr_t address) {
  const std::uintptr_t begin = address & ~(page_bytes - 1);
  // NOLINTNEXTLINE(performance-no-int-to-ptr): the signal gives it so.
  return ::mmap(reinterpret_cast<void*>(begin), entry.end - begin, PROT_READ,
                MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0) != MAP_FAILED;
}

void pass_on(int signal, siginfo_t* info, void* context) {
  if (previous.sa_flags & SA_SIGINFO) return previous.sa_sigaction(signal, info, context);
  if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) {
    return previous.sa_handler(signal);
  }
  // A fault comes again when this returns, and then ends the process; another's signal is sent
  // anew.
  ::sigaction(signal, &previous, nullptr);
  if (info->si_code <= 0) ::raise(signal);
}

void on_bus_error(int signal, siginfo_t* info, void* context) {
  const int saved = errno;
  const auto address = reinterpret_cast<std::uintptr_t>(info->si_addr);
  Entry* const entry = info->si_code > 0 ? find(address) : nullptr;
  if (entry != nullptr) entry->lost = true;  // before another thread can see zeros
  if (entry == nullptr || !replace(*entry, address)) pass_on(signal, info, context);
  errno = saved;
}

void install() {
  page_bytes = static_cast<std::uintptr_t>(::sysconf(_SC_PAGESIZE));
  ::sigaction(SIGBUS, nullptr, &previous);
  struct sigaction action {};
  action.sa_sigaction = on_bus_error;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  ::sigaction(SIGBUS, &action, nullptr);
}

/// An entry that no guard has.
Entry* claim() {
  for (Entry* entry = entries; entry != nullptr; entry = entry->next) {
    if (!entry->used.exchange(true)) return entry;
  }
  auto* const entry = new Entry;  // stays, as the handler may be reading the list
  entry->used = true;
  entry->next = entries;
  while (!entries.compare_exchange_weak(entry->next, entry)) {
  }
  return entry;
}

}  // namespace

BusGuard::BusGuard(void* begin, std::size_t bytes) {
  static std::once_flag once;
  std::call_once(once, install);
  entry_ = claim();
  entry_->lost = false;
  entry_->begin = reinterpret_cast<std::uintptr_t>(begin);
  entry_->end = entry_->begin + bytes;
}

BusGuard::~BusGuard() {
  entry_->end = 0;
  entry_->begin = 0;
  entry_->used = false;
}

bool BusGuard::lost() const { return entry_->lost; }

}  // namespace keyfold::store
