// Compiled once per instruction set and dispatched at run time, as Google Highway does it.
#include "ceilings.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <latch>
#include <new>
#include <thread>
#include <utility>
#include <vector>

#include "memory.hpp"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ceilings.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>
#if HWY_ONCE && HWY_ARCH_X86
#include <immintrin.h>
#endif

HWY_BEFORE_NAMESPACE();
namespace keyfold::cli::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using Floats = hn::ScalableTag<float>;
using Vector = hn::Vec<Floats>;

/// Independent accumulators: enough to cover latency x ports (2 x 5 on x86, 4 x 4 on the widest
/// Arm cores), few enough to stay in the registers (16 with AVX2, 32 on Arm).
constexpr std::size_t kChains = HWY_ARCH_X86 ? 12 : 24;

template <std::size_t... kChain>
HWY_NOINLINE float fma_loop(std::int64_t iterations, std::index_sequence<kChain...>) {
  const Floats d;
  // Values that the compiler cannot know and that settle at 1, far from overflow and denormals.
  const Vector factor = hn::Set(d, 1 - 1 / static_cast<float>(iterations));
  const Vector term = hn::Set(d, 1 / static_cast<float>(iterations));
  Vector sums[] = {hn::Set(d, static_cast<float>(kChain))...};
  for (std::int64_t i = 0; i < iterations; ++i)
    ((sums[kChain] = hn::MulAdd(sums[kChain], factor, term)), ...);
  Vector total = hn::Zero(d);
  ((total = hn::Add(total, sums[kChain])), ...);
  return hn::GetLane(hn::SumOfLanes(d, total));
}

/// Returns the flops done, with a value that depends on all of them in `sink`.
double run_fma(std::int64_t iterations, float& sink) {
  sink = fma_loop(iterations, std::make_index_sequence<kChains>());
  return 2.0 * static_cast<double>(hn::Lanes(Floats()) * kChains) * static_cast<double>(iterations);
}

/// The sum of `count` floats, a multiple of 8 vectors.
float run_sum(const float* data, std::size_t count) {
  const Floats d;
  const std::size_t lanes = hn::Lanes(d);
  Vector a = hn::Zero(d), b = a, c = a, e = a;
  for (std::size_t i = 0; i + 4 * lanes <= count; i += 4 * lanes) {
    a = hn::Add(a, hn::Load(d, data + i));
    b = hn::Add(b, hn::Load(d, data + i + lanes));
    c = hn::Add(c, hn::Load(d, data + i + 2 * lanes));
    e = hn::Add(e, hn::Load(d, data + i + 3 * lanes));
  }
  return hn::GetLane(hn::SumOfLanes(d, hn::Add(hn::Add(a, b), hn::Add(c, e))));
}

}  // namespace keyfold::cli::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace keyfold::cli {
namespace {

HWY_EXPORT(run_fma);
HWY_EXPORT(run_sum);

#if HWY_ARCH_X86
/// As run_fma, of products of bfloat16 pairs (vdpbf16ps), for which this Highway has no target.
__attribute__((target("avx512f,avx512bf16"))) double run_pairs(std::int64_t iterations,
                                                               float& sink) {
  constexpr std::size_t kSums = 12;
  const __m512bh ones = _mm512_cvtne2ps_pbh(_mm512_set1_ps(1), _mm512_set1_ps(1));
  __m512 sums[kSums];
  for (std::size_t s = 0; s < kSums; ++s) sums[s] = _mm512_set1_ps(static_cast<float>(s));
  for (std::int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 12
    for (std::size_t s = 0; s < kSums; ++s) sums[s] = _mm512_dpbf16_ps(sums[s], ones, ones);
  }
  for (std::size_t s = 1; s < kSums; ++s) sums[0] = _mm512_add_ps(sums[0], sums[s]);
  sink = _mm512_cvtss_f32(sums[0]);
  return 4.0 * 16 * kSums * static_cast<double>(iterations);
}

bool has_pairs() { return __builtin_cpu_supports("avx512bf16") != 0; }
#else
bool has_pairs() { return false; }
double run_pairs(std::int64_t, float&) { return 0; }
#endif

double run_multiply_adds(std::int64_t iterations, float& sink) {
  return HWY_DYNAMIC_DISPATCH(run_fma)(iterations, sink);
}

constexpr int kRuns = 5;

/// The best rate of what `run` does on all threads at once, in GFLOP/s.
double measure_flops(int num_threads, const std::function<void()>& between,
                     double (*run)(std::int64_t iterations, float& sink)) {
  constexpr std::int64_t kIterations = 4'000'000;
  std::vector<float> sinks(static_cast<std::size_t>(num_threads));
  std::atomic<double> flops_per_thread = 0;
  double best = 0;
  for (int i = 0; i < kRuns; ++i) {
    between();
    const double seconds = timed_on_threads(num_threads, [&](int thread) {
      flops_per_thread = run(kIterations, sinks[static_cast<std::size_t>(thread)]);
    });
    best = std::max(best, flops_per_thread * num_threads / seconds / 1e9);
  }
  return best;
}

/// Anonymous memory, unmapped at the end; huge pages where the system has them.
class Pages {
 public:
  explicit Pages(std::size_t size)
      : size_(size),
        data_(mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)) {
    if (data_ == MAP_FAILED) throw std::bad_alloc();
    madvise(data_, size_, MADV_HUGEPAGE);
  }
  ~Pages() { munmap(data_, size_); }
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;
  float* data() const { return static_cast<float*>(data_); }

 private:
  std::size_t size_;
  void* data_;
};

double measure_read(int num_threads, const std::function<void()>& between) {
  constexpr std::size_t kMost = std::size_t{1} << 30, kGrain = 4096;
  const auto threads = static_cast<std::size_t>(num_threads);
  const auto free_bytes = static_cast<std::size_t>(memory_available());
  const std::size_t bytes = free_bytes > 0 ? std::min(kMost, free_bytes / 4) : kMost;
  const std::size_t share = std::max<std::size_t>(bytes / threads / kGrain, 1) * kGrain;
  const std::size_t count = share / sizeof(float);
  const Pages pages(share * threads);
  std::vector<float> sinks(threads);
  const auto part = [&](int thread) {
    return pages.data() + count * static_cast<std::size_t>(thread);
  };
  timed_on_threads(num_threads, [&](int thread) { std::fill_n(part(thread), count, 1.0F); });
  double best = 0;
  for (int run = 0; run < kRuns; ++run) {
    between();
    const double seconds = timed_on_threads(num_threads, [&](int thread) {
      sinks[static_cast<std::size_t>(thread)] = HWY_DYNAMIC_DISPATCH(run_sum)(part(thread), count);
    });
    best = std::max(best, static_cast<double>(share * threads) / seconds / 1e9);
  }
  return best;
}

}  // namespace

double timed_on_threads(int num_threads, const std::function<void(int)>& work) {
  using Clock = std::chrono::steady_clock;
  // Each thread takes its own times: on a busy machine this one may wake after the work is done.
  std::vector<Clock::time_point> begins(static_cast<std::size_t>(num_threads)), ends(begins);
  std::latch ready(num_threads);
  std::vector<std::jthread> threads;
  threads.reserve(begins.size());
  for (int thread = 0; thread < num_threads; ++thread)
    threads.emplace_back([&, thread, index = static_cast<std::size_t>(thread)] {
      ready.arrive_and_wait();
      begins[index] = Clock::now();
      work(thread);
      ends[index] = Clock::now();
    });
  threads.clear();  // joins
  return std::chrono::duration<double>(*std::ranges::max_element(ends) -
                                       *std::ranges::min_element(begins))
      .count();
}

Ceilings measure_ceilings(int num_threads, const std::function<void()>& between) {
  return {.fma_gflops = measure_flops(num_threads, between, run_multiply_adds),
          .bfloat16_gflops = has_pairs() ? measure_flops(num_threads, between, run_pairs) : 0,
          .read_gbs = measure_read(num_threads, between)};
}

}  // namespace keyfold::cli
#endif  // HWY_ONCE
