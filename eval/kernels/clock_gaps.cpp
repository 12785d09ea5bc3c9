// What the machine takes away: how much longer than it should a step lasts that does nothing but read the clock.
//
//   clock_gaps [SECONDS]
//
// One thread on each of the processors this process may use reads the clock all the time; where two readings lie more
// than 50 us apart, something else ran there: another process, the kernel, or another guest of the same host. A step of
// several threads that wait for each other all the time makes progress only while none of them is away. For steps of
// some lengths: the percentiles of the time they take, over their length. No engine is faster than that here.

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <utility>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;
using Gap = std::pair<double, double>;  // from, to; seconds

constexpr double kShortest = 50e-6;

double seconds(Clock::duration time) { return std::chrono::duration<double>(time).count(); }

std::vector<int> processors() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) != 0) return {};
  std::vector<int> ids;
  for (int id = 0; id < CPU_SETSIZE; ++id) {
    if (CPU_ISSET(id, &set)) ids.push_back(id);
  }
  return ids;
}

/// Reads the clock on one processor from `begin` for so many seconds; returns when it could not.
std::vector<Gap> watch(int processor, Clock::time_point begin, double duration) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(static_cast<std::size_t>(processor), &set);
  if (pthread_setaffinity_np(pthread_self(), sizeof(set), &set) != 0) std::abort();
  std::vector<Gap> gaps;
  double last = seconds(Clock::now() - begin);
  while (last < duration) {
    const double now = seconds(Clock::now() - begin);
    if (now - last > kShortest) gaps.emplace_back(last, now);
    last = now;
  }
  return gaps;
}

/// When at least one thread was away.
std::vector<Gap> united(std::vector<Gap> gaps) {
  std::sort(gaps.begin(), gaps.end());
  std::vector<Gap> result;
  for (const Gap& gap : gaps) {
    if (!result.empty() && gap.first <= result.back().second) {
      result.back().second = std::max(result.back().second, gap.second);
    } else {
      result.push_back(gap);
    }
  }
  return result;
}

/// How long steps of `length` take that follow each other, sorted.
std::vector<double> steps(const std::vector<Gap>& gaps, double length, double duration) {
  std::vector<double> times;
  std::size_t next = 0;
  for (double now = 0.0; now + length < duration;) {
    const double begun = now;
    double left = length;
    for (; next < gaps.size() && gaps[next].first < now + left; ++next) {
      left -= std::max(gaps[next].first - now, 0.0);
      now = gaps[next].second;
    }
    now += left;
    times.push_back(now - begun);
  }
  std::sort(times.begin(), times.end());
  return times;
}

double percentile(const std::vector<double>& sorted, double share) {
  return sorted[std::min(sorted.size() - 1, static_cast<std::size_t>(share * static_cast<double>(sorted.size())))];
}

}  // namespace

int main(int argc, char** argv) {
  const double duration = argc > 1 ? std::atof(argv[1]) : 20.0;
  const std::vector<int> ids = processors();
  if (argc > 2 || duration < 1.0 || ids.empty()) {
    std::fprintf(stderr, "usage: clock_gaps [SECONDS >= 1]\n");
    return 2;
  }
  std::vector<std::vector<Gap>> found(ids.size());
  std::vector<std::thread> threads;
  const Clock::time_point begin = Clock::now();
  for (std::size_t i = 0; i < ids.size(); ++i) {
    threads.emplace_back([&, i] { found[i] = watch(ids[i], begin, duration); });
  }
  for (std::thread& thread : threads) thread.join();

  std::vector<Gap> all;
  for (std::size_t i = 0; i < ids.size(); ++i) {
    double away = 0.0, longest = 0.0;
    for (const Gap& gap : found[i]) {
      away += gap.second - gap.first;
      longest = std::max(longest, gap.second - gap.first);
    }
    std::printf("processor %d: away %zu times in %.0f s, %.2f %% of the time, at most %.1f ms\n", ids[i],
                found[i].size(), duration, 1e2 * away / duration, 1e3 * longest);
    all.insert(all.end(), found[i].begin(), found[i].end());
  }
  const std::vector<Gap> gaps = united(all);
  for (const double length : {2e-3, 4e-3, 6e-3, 8e-3, 12e-3, 16e-3}) {
    const std::vector<double> times = steps(gaps, length, duration);
    if (times.empty()) continue;
    std::printf("steps of %4.1f ms: p50 %.2f, p90 %.2f, p99 %.2f, p99.9 %.2f times their length\n", 1e3 * length,
                percentile(times, 0.5) / length, percentile(times, 0.9) / length, percentile(times, 0.99) / length,
                percentile(times, 0.999) / length);
  }
}
