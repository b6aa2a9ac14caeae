// parallel_for: independent items over a few threads.
//
//   parallel_for(count, threads, [&](int64_t item, int32_t worker) { ... });
//
// calls the body once for each item of 0..count-1. At most min(count, threads) items run at a time, each on another
// worker of 0..threads-1, so a worker may own scratch memory. The caller is worker 0 and no thread is started for one
// item. Items are handed out one by one: a slow core does fewer of them. What a body writes must not depend on the
// worker; then results do not depend on `threads` either. Bodies must not throw. A thread the system refuses to start
// is done without.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

template <typename Body>
void parallel_for(int64_t count, int64_t threads, const Body &body) {
    std::atomic<int64_t> next{0};
    auto work = [&](int32_t worker) {
        for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(item, worker);
    };
    std::vector<std::thread> helpers;
    const int64_t workers = std::min(count, threads);
    try {
        for (int32_t worker = 1; worker < workers; ++worker) helpers.emplace_back(work, worker);
    } catch (const std::system_error &) {
    }
    work(0);
    for (std::thread &helper : helpers) helper.join();
}
