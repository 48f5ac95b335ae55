// Threads that share one pass: every output is computed whole by one of them, so that results do
// not depend on their number.
//
// Whoever waits is awake for a moment, since pieces of work follow each other within microseconds, and
// then asleep: where others use the cores too, a thread that only waits must not hold one that a thread
// with work could have. One pass at a time has helpers; another one runs alone.
#pragma once

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace twotower {

constexpr int PARTS_EACH = 4;  // pieces of a split for each thread
constexpr int RESTLESS = 1024;  // turns, some 0.05 ms, before who waits falls asleep

// Wait until the value is not `old` any more, or a while.
template <typename Value>
void wait_for_change(const std::atomic<Value> &value, Value old) {
    for (int turns = 0; turns < RESTLESS; turns++) {
        if (value.load(std::memory_order_acquire) != old) return;
#if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
#endif
    }
    value.wait(old, std::memory_order_acquire);
}

class Helpers {
  public:
    explicit Helpers(int count) {
        for (int i = 0; i < count; i++) threads_.emplace_back([this] { serve(); });
    }

    ~Helpers() {
        is_over_.store(true, std::memory_order_release);
        publish(0);
        for (auto &thread : threads_) thread.join();
    }

    int count() const { return int(threads_.size()); }

    // work(context, part) for each part, by whoever is free: nobody waits for a helper that the system
    // has not let run, only for a part that somebody has begun.
    void run(void (*work)(void *, int), void *context, int parts) {
        work_ = work, context_ = context;
        left_.store(parts, std::memory_order_relaxed);
        publish(uint32_t(parts));
        take_parts();
        for (int left; (left = left_.load(std::memory_order_acquire)) > 0;) wait_for_change(left_, left);
    }

  private:
    void publish(uint32_t parts) {
        open_.store(++round_ << 32 | parts, std::memory_order_release);
        open_.notify_all();
    }

    // Returns what `open_` was when no part was left. Who takes a part keeps the round, and so work_
    // and context_, alive.
    uint64_t take_parts() {
        uint64_t open = open_.load(std::memory_order_acquire);
        while (uint32_t(open) != 0) {
            if (!open_.compare_exchange_weak(open, open - 1, std::memory_order_acq_rel)) continue;
            work_(context_, int(uint32_t(open)) - 1);
            if (left_.fetch_sub(1, std::memory_order_acq_rel) == 1) left_.notify_all();
            open = open_.load(std::memory_order_acquire);
        }
        return open;
    }

    void serve() {
        while (!is_over_.load(std::memory_order_acquire)) wait_for_change(open_, take_parts());
    }

    std::vector<std::thread> threads_;
    std::atomic<bool> is_over_{false};
    uint64_t round_ = 0;
    std::atomic<uint64_t> open_{0};  // the round, and below it how many of its parts are not begun
    std::atomic<int> left_{0};  // parts that are not finished
    void (*work_)(void *, int) = nullptr;
    void *context_ = nullptr;
};

inline std::mutex in_use;             // whoever holds it has the helpers
inline Helpers *helpers = nullptr;    // never destroyed at the end of the process: they sleep

// Those who work on one pass: this thread and, if they are free, `threads - 1` helpers.
class Team {
  public:
    explicit Team(int threads) {
        if (threads < 2 || !in_use.try_lock()) return;
        static const int registered = pthread_atfork(nullptr, nullptr, [] { helpers = nullptr; });
        (void)registered;  // a child process has the memory of its parent's helpers, but no helpers
        if (helpers != nullptr && helpers->count() != threads - 1) {
            delete helpers;
            helpers = nullptr;
        }
        if (helpers == nullptr) helpers = new Helpers(threads - 1);
        mine_ = helpers;
    }

    ~Team() {
        if (mine_ != nullptr) in_use.unlock();
    }

    Team(const Team &) = delete;
    Team &operator=(const Team &) = delete;

    int count() const { return mine_ == nullptr ? 1 : mine_->count() + 1; }

    // work(begin, end) over all of 0 to count, each part by one thread.
    template <typename Work>
    void split(int count, Work work) {
        if (mine_ == nullptr || count < 2) return work(0, count);
        int parts = std::min(count, PARTS_EACH * (mine_->count() + 1));
        struct Shared { Work *work; int count, parts; } shared{&work, count, parts};
        mine_->run(
            [](void *context, int left) {
                Shared &s = *static_cast<Shared *>(context);
                int part = s.parts - 1 - left;  // in the order of memory
                int begin = int(int64_t(s.count) * part / s.parts);
                int end = int(int64_t(s.count) * (part + 1) / s.parts);
                if (begin < end) (*s.work)(begin, end);
            },
            &shared, parts);
    }

  private:
    Helpers *mine_ = nullptr;
};

}  // namespace twotower
