// Memory for weights (zeros) and for what passes through the layers: in huge pages where the system has them, as all of it is
// read for every token.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

// One block, from the start of a huge page.
class Memory {
public:
    Memory() = default;
    explicit Memory(int64_t bytes) : bytes_((bytes + kHuge - 1) / kHuge * kHuge) {
        data_ = static_cast<uint8_t*>(std::aligned_alloc(kHuge, bytes_));
        if (!data_) throw std::bad_alloc();
#if defined(__linux__)
        madvise(data_, bytes_, MADV_HUGEPAGE);
#endif
    }
    Memory(Memory&& other) noexcept : data_(std::exchange(other.data_, nullptr)), bytes_(other.bytes_) {}
    Memory& operator=(Memory&& other) noexcept {
        std::swap(data_, other.data_);
        std::swap(bytes_, other.bytes_);
        return *this;
    }
    ~Memory() { std::free(data_); }

    uint8_t* get() const { return data_; }
    int64_t bytes() const { return bytes_; }

private:
    static constexpr int64_t kHuge = 2 << 20;
    uint8_t* data_ = nullptr;
    int64_t bytes_ = 0;
};

// Many pieces that live equally long, one after the other in few blocks: none is rounded up to a page of its own.
class Arena {
public:
    uint8_t* take(int64_t bytes) {
        bytes = (bytes + 63) / 64 * 64;
        if (blocks_.empty() || used_ + bytes > blocks_.back().bytes()) {
            blocks_.emplace_back(bytes > kBlock ? bytes : kBlock);
            used_ = 0;
        }
        uint8_t* piece = blocks_.back().get() + used_;
        used_ += bytes;
        std::memset(piece, 0, bytes);
        taken_ += bytes;
        return piece;
    }
    int64_t bytes() const { return taken_; }

private:
    static constexpr int64_t kBlock = 32 << 20;
    std::vector<Memory> blocks_;
    int64_t used_ = 0, taken_ = 0;
};
