// Threads that work together on one forward pass: they meet at barriers thousands of times a second, so they wait by
// looking (spinning) for a short while, and only then sleep.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

// Hands out the numbers 0 ... count - 1 to threads: to each its own part, in order, and then what others have left, from the
// end. So a thread that was held up makes nobody wait, and yet each reads memory from front to back.
class Shares {
public:
    explicit Shares(int threads) : parts_(threads) {}

    void deal(int count) {
        const int64_t threads = parts_.size();
        for (int64_t t = 0; t < threads; t++) parts_[t].range.store(pack(count * t / threads, count * (t + 1) / threads), std::memory_order_relaxed);
    }

    // The next number for a thread; -1 when there is none.
    int take(int thread) {
        for (size_t i = 0; i < parts_.size(); i++) {
            std::atomic<uint64_t>& range = parts_[(thread + i) % parts_.size()].range;
            uint64_t seen = range.load(std::memory_order_relaxed);
            while (first(seen) < last(seen)) {
                const bool mine = i == 0;
                const uint64_t rest = mine ? pack(first(seen) + 1, last(seen)) : pack(first(seen), last(seen) - 1);
                if (range.compare_exchange_weak(seen, rest, std::memory_order_relaxed)) return int(mine ? first(seen) : last(seen) - 1);
            }
        }
        return -1;
    }

private:
    struct alignas(64) Part {  // a cache line each
        std::atomic<uint64_t> range{0};
        Part() = default;
        Part(Part&&) noexcept {}
    };
    static uint64_t pack(uint64_t first, uint64_t last) { return first << 32 | last; }
    static uint64_t first(uint64_t range) { return range >> 32; }
    static uint64_t last(uint64_t range) { return range & 0xffffffff; }
    std::vector<Part> parts_;
};

class Team {
public:
    explicit Team(int size) : size_(size) {
        try {
            for (int i = 1; i < size; i++) threads_.emplace_back([this, i] { serve(i); });
        } catch (...) {  // the system gives no more threads: those that there are must end before this does
            stop();
            throw;
        }
    }
    ~Team() { stop(); }
    Team(const Team&) = delete;
    Team& operator=(const Team&) = delete;

    int size() const { return size_; }

    // Calls work(i) in thread i for every i, this thread being 0; returns when all have ended.
    void run(std::function<void(int)> work) {
        work_ = std::move(work);
        announce();
        work_(0);
        barrier();
    }

    // Nobody passes before all have come. What was written before it is seen after it.
    void barrier() {
        if (size_ == 1) return;
        const uint32_t round = round_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
            arrived_.store(0, std::memory_order_relaxed);
            round_.store(round + 1, std::memory_order_release);
        } else {
            for (int spins = 0; round_.load(std::memory_order_acquire) == round; spins++) pause(spins);
        }
    }

    // The part of `count` things that belongs to a thread.
    std::pair<int, int> part(int count, int thread) const {
        return {int(int64_t(count) * thread / size_), int(int64_t(count) * (thread + 1) / size_)};
    }

private:
    static constexpr int kSpins = 20000;  // about 0.2 ms between two tokens, before a thread sleeps

    static void pause(int spins) {
        if (spins > 2000) return std::this_thread::yield();  // more threads than cores, or a busy machine
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }

    void stop() {
        stopping_.store(true);
        announce();
        for (auto& thread : threads_) thread.join();
    }

    void announce() {
        if (size_ == 1) return;
        { std::lock_guard<std::mutex> lock(mutex_); job_.fetch_add(1, std::memory_order_release); }
        if (sleeping_.load() > 0) wake_.notify_all();
    }

    void serve(int thread) {
        for (uint32_t seen = 0;;) {
            for (int spins = 0; job_.load(std::memory_order_acquire) == seen && spins < kSpins; spins++) pause(spins % 2000);
            if (job_.load(std::memory_order_acquire) == seen) {
                std::unique_lock<std::mutex> lock(mutex_);
                sleeping_.fetch_add(1);
                wake_.wait(lock, [&] { return job_.load() != seen; });
                sleeping_.fetch_sub(1);
            }
            seen++;
            if (stopping_.load()) return;
            work_(thread);
            barrier();
        }
    }

    const int size_;
    std::function<void(int)> work_;
    std::atomic<uint32_t> job_{0}, round_{0};
    std::atomic<int> arrived_{0}, sleeping_{0};
    std::atomic<bool> stopping_{false};
    std::mutex mutex_;
    std::condition_variable wake_;
    std::vector<std::thread> threads_;  // last: they must not start before the rest is there
};
