// Threads that share one pass: every output is computed whole by one of them, so that results do
// not depend on their number.
//
// Helpers wait for a pass asleep and, while it runs and a little longer, for its next piece of work
// awake: pieces follow each other within microseconds, and the head's product follows its pass. One
// pass at a time has helpers; another one runs alone.
#pragma once

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace twotower {

constexpr int PARTS_EACH = 4;  // pieces of a split for each thread
constexpr int RESTLESS = 4096;  // turns, some 0.2 ms, before who waits falls asleep

inline void spin(int &turns) {
    if (++turns % 1024 == 0) std::this_thread::yield();  // somebody else may need the core
#if defined(__x86_64__) || defined(__i386__)
    else __builtin_ia32_pause();
#endif
}

class Helpers {
  public:
    explicit Helpers(int count) {
        for (int i = 0; i < count; i++) threads_.emplace_back([this] { serve(); });
    }

    ~Helpers() {
        set(is_over_, true);
        for (auto &thread : threads_) thread.join();
    }

    int count() const { return int(threads_.size()); }
    void wake() { set(is_awake_, true); }
    void sleep() { is_awake_.store(false, std::memory_order_release); }

    // work(context, part) for each part, by whoever is free: nobody waits for a helper that the system
    // has not let run, only for a part that somebody has begun.
    void run(void (*work)(void *, int), void *context, int parts) {
        work_ = work, context_ = context;
        finished_.store(0, std::memory_order_relaxed);
        round_++;
        open_.store(round_ << 32 | uint32_t(parts), std::memory_order_release);
        take_parts();
        for (int turns = 0; finished_.load(std::memory_order_acquire) < parts;) spin(turns);
    }

  private:
    void set(std::atomic<bool> &flag, bool value) {
        { std::lock_guard<std::mutex> lock(mutex_); flag.store(value, std::memory_order_release); }
        condition_.notify_all();
    }

    // Whether there was any. Who takes a part keeps the round, and so work_ and context_, alive.
    bool take_parts() {
        bool found = false;
        uint64_t open = open_.load(std::memory_order_acquire);
        while (uint32_t(open) != 0) {
            if (!open_.compare_exchange_weak(open, open - 1, std::memory_order_acq_rel)) continue;
            work_(context_, int(uint32_t(open)) - 1);
            finished_.fetch_add(1, std::memory_order_release);
            found = true, open = open_.load(std::memory_order_acquire);
        }
        return found;
    }

    void serve() {
        for (int turns = 0;;) {
            if (take_parts()) {
                turns = 0;
            } else if (is_awake_.load(std::memory_order_acquire) || turns < RESTLESS) {
                spin(turns);
            } else {
                std::unique_lock<std::mutex> lock(mutex_);
                condition_.wait(lock, [&] { return is_awake_ || is_over_; });
                if (is_over_) return;
            }
        }
    }

    std::vector<std::thread> threads_;
    std::mutex mutex_;
    std::condition_variable condition_;
    std::atomic<bool> is_awake_{false}, is_over_{false};
    uint64_t round_ = 0;
    std::atomic<uint64_t> open_{0};  // the round, and below it how many of its parts are not begun
    std::atomic<int> finished_{0};
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
        mine_->wake();
    }

    ~Team() {
        if (mine_ == nullptr) return;
        mine_->sleep();
        in_use.unlock();
    }

    Team(const Team &) = delete;
    Team &operator=(const Team &) = delete;

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
