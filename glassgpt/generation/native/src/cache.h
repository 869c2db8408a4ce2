// Keys and values of earlier positions, in pages of 64 that sequences share as long as they are alike.
#pragma once
#include "kernels.h"
#include "memory.h"

#include <memory>
#include <vector>

struct CacheShape {
    Format format;  // float32, bfloat16 or 8 bits (a scale for each key and value vector)
    int layers, heads, width;

    int key_inputs() const { return round_up(width, 4); }
    int padded_width() const { return round_up(width, 16); }
    int64_t unit() const { return format == kFloat32 ? 4 : format == kBfloat16 ? 2 : 1; }
    int64_t key_bytes() const { return key_inputs() * kPage * unit(); }
    int64_t value_bytes() const { return padded_width() * kPage * unit(); }
    int64_t head_bytes() const { return key_bytes() + value_bytes() + (format == kInt8 ? 8 * kPage : 0); }
    int64_t page_bytes() const { return layers * heads * head_bytes(); }

    // Where the parts of a head lie in a page: keys, values, then their scales.
    Pages pages(int layer, int head, const uint8_t* const* pages) const {
        const int64_t start = (int64_t(layer) * heads + head) * head_bytes(), scales = start + key_bytes() + value_bytes();
        return {format, width, padded_width(), pages, start, start + key_bytes(), start + head_bytes(), scales, scales + 4 * kPage};
    }
};

// Memory of pages: what one text gives back, the next one takes.
class Pool {
public:
    explicit Pool(int64_t page_bytes) : bytes_(page_bytes) {}
    ~Pool() {
        for (uint8_t* page : free_) ::operator delete[](page, std::align_val_t(64));
    }
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    uint8_t* take() {
        if (free_.empty()) return new (std::align_val_t(64)) uint8_t[bytes_];
        uint8_t* page = free_.back();
        free_.pop_back();
        return page;
    }
    void give(uint8_t* page) { free_.push_back(page); }
    int64_t bytes() const { return bytes_; }

private:
    int64_t bytes_;
    std::vector<uint8_t*> free_;
};

// All layers and heads of 64 positions: keys (columns are positions, inputs the width), values (the other way round).
class Page {
public:
    explicit Page(Pool& pool) : pool_(pool), data_(pool.take()) {
        std::memset(data_, 0, pool.bytes());  // a place that is not yet written counts with weight 0: it must be a number
    }
    Page(const Page& other) : pool_(other.pool_), data_(pool_.take()) { std::memcpy(data_, other.data_, pool_.bytes()); }
    Page& operator=(const Page&) = delete;
    ~Page() { pool_.give(data_); }
    uint8_t* data() const { return data_; }

private:
    Pool& pool_;
    uint8_t* data_;
};

// A text's positions. Copies share their pages; a page that is shared is copied before it is written to.
struct Sequence {
    int length = 0;
    std::vector<std::shared_ptr<Page>> pages;
    std::vector<uint8_t*> data;  // of the pages

    // Makes room for one more position, for this sequence alone; gives its number.
    int extend(Pool& pool) {
        const size_t page = length / kPage;
        if (page == pages.size()) {
            pages.push_back(std::make_shared<Page>(pool));
            data.push_back(pages.back()->data());
        } else if (pages[page].use_count() > 1) {
            pages[page] = std::make_shared<Page>(*pages[page]);
            data[page] = pages[page]->data();
        }
        return length++;
    }
    void rewind(int positions) {
        length = positions;
        const size_t needed = (positions + kPage - 1) / kPage;
        pages.resize(needed);
        data.resize(needed);
    }
};

// Four bytes hold T numbers of one column: of a key's column (a position) one after the other, of a value's the same number of T
// positions, which several threads may write at once.
template <int T, class Number>
static inline void write_row(uint8_t* to, const Number* from, int width, int columns, int place, bool is_key) {
    Number* numbers = reinterpret_cast<Number*>(to);
    if (is_key)
        for (int i = 0; i < width; i += T) std::memcpy(numbers + (i / T * columns + place) * T, from + i, 4);
    else
        for (int i = 0; i < width; i++) numbers[(place / T * columns + i) * T + place % T] = from[i];
}

// Writes the key or the value of one position of one head, made ready as one row of inputs: (W) numbers of the format, then as many
// zeros as are missing to a multiple of four, and their scale.
static inline void write(const CacheShape& shape, uint8_t* page, int layer, int head, int position, bool is_key, void* ready, float scale) {
    const Pages at = shape.pages(layer, head, nullptr);
    const int place = position % kPage, columns = is_key ? kPage : shape.padded_width();
    uint8_t* to = page + (is_key ? at.key_offset : at.value_offset);
    if (shape.format == kFloat32) return write_row<1>(to, static_cast<const uint32_t*>(ready), shape.width, columns, place, is_key);
    if (shape.format == kBfloat16) return write_row<2>(to, static_cast<const uint16_t*>(ready), shape.width, columns, place, is_key);
    auto* codes = static_cast<uint8_t*>(ready);
    for (int i = 0; i < shape.width; i++) codes[i] += 128;
    write_row<4>(to, codes, shape.width, columns, place, is_key);
    reinterpret_cast<float*>(page + (is_key ? at.key_scale_offset : at.value_scale_offset))[place] = scale;
}
