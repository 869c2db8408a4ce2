// One forward pass of a GPT, by a team of threads. Every matrix is cut by outputs: a thread makes its own panels of them
// and reads what all have made before, so a number never depends on how many threads there are.
#include "engine.h"

#include "cache.h"
#include "draw.h"
#include "kernels.h"
#include "matrix.h"
#include "team.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <map>
#include <set>
#include <stdexcept>
#include <string>

const Kernels* find_kernels(const char* name);  // dispatch.cpp

namespace {

constexpr int kChunk = 512;  // tokens that go through the layers together: what they need stays near
constexpr int kAlone = 4;    // up to so many rows, each thread makes all of them ready for itself: cheaper than to meet

[[noreturn]] void fail(const std::string& why) { throw std::runtime_error(why); }

struct Layer {
    Matrix matrices[kHead];
    std::vector<float> vectors[kFinalNorm];
    int window = 0;  // 0: sees everything
};

// Inputs made ready for a matrix.
struct Ready {
    size_t step = 0;  // shares of this pass that the thread has had its part of
    std::vector<uint8_t> data;
    std::vector<float> scale, row;
    std::vector<int32_t> zeros;
};

struct Token {
    int32_t id;
    Sequence* sequence;
    int position;
};

struct LogSum {  // of a block of logits
    float maximum, total;
};

struct Tile {  // tokens of one sequence, one after the other
    int first, count;
};

}  // namespace

struct glass_engine {
    glass_shape shape;
    const Kernels* kernels;
    Team team;
    Arena arena;
    std::vector<Layer> layers;
    Matrix head, embedding;
    std::vector<float> vectors[kVectors];  // those that belong to no layer
    CacheShape cache;
    Pool pool;
    std::map<int32_t, Sequence> sequences;
    int32_t next_sequence = 1;
    std::mutex mutex;

    // What a chunk of tokens goes through: (tokens, ...)
    std::vector<Token> tokens;
    std::vector<Tile> tiles;
    bool strangers = false;                    // each token is of another sequence
    std::vector<LogSum> parts;
    std::vector<Shares> shares;                // panels of each matrix and tiles of each attention, in the order of a pass
    Memory room;                               // of the next five
    float *x = nullptr, *qkv = nullptr, *z = nullptr, *hidden = nullptr, *gate = nullptr;
    Ready common;
    std::vector<Ready> own;                    // a thread's
    std::vector<std::vector<float>> scratch;

    glass_engine(const glass_shape& shape, int threads, const Kernels* kernels)
        : shape(shape), kernels(kernels), team(threads), layers(shape.layers),
          cache{Format(shape.cache_format), shape.layers, shape.kv_heads, shape.head_width}, pool(cache.page_bytes()),
          own(threads), scratch(threads) {}

    // Logits that one thread makes and looks through while they are near: whole panels, many blocks.
    int block() const { return shape.vocab < 16384 ? 2 * kPanel : 512; }
    int blocks() const { return (shape.vocab + block() - 1) / block(); }
    const Matrix& head_matrix() const { return head.N ? head : embedding; }
    const Matrix& embedding_matrix() const { return embedding.N ? embedding : head; }
    const float* vector(int layer, int name) const {
        const auto& found = name < kFinalNorm ? layers[layer].vectors[name] : vectors[name];
        return found.empty() ? nullptr : found.data();
    }

    // ---- parts of a forward pass; every thread calls them --------------------------------------------------------

    void norm(const float* from, int width, const float* weight, const float* bias, float* to) const {
        kernels->norm(from, width, shape.rms_norm, shape.epsilon, weight, bias, to);
    }

    // Rows of x (rows, stride), or those that `chosen` names, normed if there is a weight, as a matrix wants its inputs.
    Rows ready(int thread, const Matrix& matrix, const float* from, int64_t stride, int count, const int32_t* chosen = nullptr,
               const float* weight = nullptr, const float* bias = nullptr) {
        const bool alone = count <= kAlone;
        Ready& to = alone ? own[thread] : common;
        const int planes = matrix.is_coded() ? shape.planes : 1, unit = matrix.format == kFloat32 ? 4 : matrix.format == kBfloat16 ? 2 : 1;
        const auto [begin, end] = alone ? std::pair(0, count) : team.part(count, thread);
        std::vector<float>& row = own[thread].row;
        for (int r = begin; r < end; r++) {
            const float* source = from + (chosen ? chosen[r] : r) * stride;
            if (weight) norm(source, matrix.K, weight, bias, row.data()), source = row.data();
            kernels->prepare(matrix.format, planes, source, matrix.K, matrix.inputs, matrix.group_inputs,
                             to.data.data() + int64_t(r) * planes * matrix.inputs * unit, to.scale.data() + r,
                             to.zeros.data() + int64_t(r) * planes * matrix.groups);
        }
        if (!alone) team.barrier();
        return {to.data.data(), matrix.inputs, planes, to.scale.data(), to.zeros.data()};
    }

    static void reserve(Ready& to, int count, const Matrix& matrix, int planes) {
        const size_t bytes = int64_t(count) * planes * matrix.inputs * (matrix.format == kFloat32 ? 4 : matrix.format == kBfloat16 ? 2 : 1);
        if (to.data.size() < bytes) to.data.resize(bytes);
        if (to.scale.size() < size_t(count)) to.scale.resize(count);
        if (to.zeros.size() < size_t(count) * planes * matrix.groups) to.zeros.resize(size_t(count) * planes * matrix.groups);
    }

    // One panel of y (rows, stride) = rows x matrix + bias, or y += that.
    void multiply(const Matrix& matrix, int panel, const Rows& rows, int count, const float* bias, float* y, int64_t stride, bool add) const {
        kernels->multiply(matrix.panel(panel), rows, 0, count, bias ? bias + panel * kPanel : nullptr, y + panel * kPanel, stride, add);
    }

    // work(item) for the items of the next share that fall to this thread.
    template <class Work>
    void each(int thread, Work work) {
        Shares& found = shares[own[thread].step++];
        for (int item; (item = found.take(thread)) >= 0;) work(item);
        team.barrier();
    }

    void embed(int thread) {
        const auto [begin, end] = team.part(int(tokens.size()), thread);
        const int64_t stride = round_up(shape.width, kPanel);
        for (int t = begin; t < end; t++) {
            float* row = x + t * stride;
            embedding_matrix().row(tokens[t].id, row);
            if (const float* place = vector(0, kPosition))
                for (int i = 0; i < shape.width; i++) row[i] += place[int64_t(tokens[t].position) * shape.width + i];
            if (const float* weight = vector(0, kEmbeddingNorm)) norm(row, shape.width, weight, vector(0, kEmbeddingNormBias), row);
        }
        team.barrier();
    }

    // Turns number i of a head with number i + W/2, by the angle of its position.
    void turn(float* head, int position) const {
        const int half = shape.head_width / 2;
        const float* cosine = vector(0, kCosine) + int64_t(position) * half;
        const float* sine = vector(0, kSine) + int64_t(position) * half;
        for (int i = 0; i < half; i++) {
            const float a = head[i], b = head[i + half];
            head[i] = a * cosine[i] - b * sine[i];
            head[i + half] = b * cosine[i] + a * sine[i];
        }
    }

    // Of one token, and one head of keys with its queries: normed and turned; key and value put into the cache.
    void remember(int thread, int layer, int t, int g, int64_t stride) {
        const int W = shape.head_width, H = shape.heads, G = shape.kv_heads;
        std::vector<float>& row = own[thread].row;
        float *q = qkv + t * stride, *k = q + int64_t(H + g) * W, *v = q + int64_t(H + G + g) * W;
        for (int h = g * (H / G); h <= (g + 1) * (H / G); h++) {  // the last one is the key
            const bool is_key = h == (g + 1) * (H / G);
            float* head = is_key ? k : q + int64_t(h) * W;
            if (const float* weight = vector(layer, is_key ? kKeyNorm : kQueryNorm))
                norm(head, W, weight, vector(layer, is_key ? kKeyNormBias : kQueryNormBias), head);
            if (vector(0, kCosine)) turn(head, tokens[t].position);
        }
        for (const float* head : {k, v}) {
            float scale;
            int32_t zero;
            kernels->prepare(cache.format, 1, head, W, cache.key_inputs(), cache.key_inputs(), row.data(), &scale, &zero);
            write(cache, tokens[t].sequence->data[tokens[t].position / kPage], layer, g, tokens[t].position, head == k, row.data(), scale);
        }
    }

    void attend(int thread, int layer, const Tile& tile, int g, int64_t stride) {
        const int W = shape.head_width, H = shape.heads, per_head = H / shape.kv_heads, window = layers[layer].window;
        const float* bias = vector(layer, kDistance);
        const Pages pages = cache.pages(layer, g, tokens[tile.first].sequence->data.data());
        Query queries[kQueries];
        int filled = 0;
        for (int i = 0; i < tile.count * per_head; i++) {
            const int t = tile.first + i / per_head, h = g * per_head + i % per_head, position = tokens[t].position;
            const float* q = qkv + t * stride + int64_t(h) * W;
            for (int j = 0; j < W; j += 16) __builtin_prefetch(q + per_head * W + j);  // the next head's
            queries[filled++] = {q, z + (int64_t(t) * H + h) * W, position, window ? std::max(0, position - window + 1) : 0,
                                 bias ? bias + int64_t(h) * shape.context : nullptr};
            if (filled == kQueries || i + 1 == tile.count * per_head) {
                kernels->attend(pages, queries, filled, shape.scale, scratch[thread].data());
                filled = 0;
            }
        }
    }

    // Attention of all tokens and heads.
    void look_back(int thread, int layer, int64_t stride) {
        const int count = int(tokens.size()), G = shape.kv_heads;
        if (!strangers) {  // some look at others of this chunk: all must be remembered before
            const auto [begin, end] = team.part(G * count, thread);
            for (int item = begin; item < end; item++) {  // token by token of a head: their keys lie side by side
                const float* later = qkv + (item + 4) % count * stride + (shape.heads + item / count) * shape.head_width;
                for (int j = 0; j < shape.head_width; j += 16) __builtin_prefetch(later + j), __builtin_prefetch(later + G * shape.head_width + j);
                remember(thread, layer, item % count, item / count, stride);
            }
            team.barrier();
        }
        each(thread, [&](int item) {
            if (strangers) remember(thread, layer, tiles[item / G].first, item % G, stride);
            attend(thread, layer, tiles[item / G], item % G, stride);
        });
    }

    void feed_forward(int thread, const Layer& layer, int index, int64_t stride) {
        const int count = int(tokens.size());
        const Matrix &up = layer.matrices[kUp], &down = layer.matrices[kDown];
        const int64_t wide = round_up(shape.hidden, kPanel);
        Rows rows = ready(thread, up, x, stride, count, nullptr, vector(index, kNorm2), vector(index, kNorm2Bias));
        each(thread, [&](int panel) {
            multiply(up, panel, rows, count, vector(index, kUpBias), hidden, wide, false);
            if (shape.gated) multiply(layer.matrices[kGate], panel, rows, count, vector(index, kGateBias), gate, wide, false);
            for (int64_t place = panel * kPanel; place < count * wide; place += wide)
                kernels->activate(Activation(shape.activation), hidden + place, shape.gated ? gate + place : nullptr, kPanel);
        });
        rows = ready(thread, down, hidden, wide, count);
        each(thread, [&](int panel) { multiply(down, panel, rows, count, vector(index, kDownBias), x, stride, true); });
    }

    void pass(int thread, int wanted, const int32_t* chosen, int ids, float* logits, int64_t logits_stride) {
        const int count = int(tokens.size());
        const int64_t stride = round_up(shape.width, kPanel), qkv_stride = round_up((shape.heads + 2 * shape.kv_heads) * shape.head_width, kPanel);
        embed(thread);
        for (int index = 0; index < shape.layers; index++) {
            const Layer& layer = layers[index];
            const Matrix &qkv_matrix = layer.matrices[kQkv], &out = layer.matrices[kOut];
            Rows rows = ready(thread, qkv_matrix, x, stride, count, nullptr, vector(index, kNorm1), vector(index, kNorm1Bias));
            each(thread, [&](int panel) { multiply(qkv_matrix, panel, rows, count, vector(index, kQkvBias), qkv, qkv_stride, false); });
            look_back(thread, index, qkv_stride);
            rows = ready(thread, out, z, int64_t(shape.heads) * shape.head_width, count);
            each(thread, [&](int panel) { multiply(out, panel, rows, count, vector(index, kOutBias), x, stride, true); });
            feed_forward(thread, layer, index, stride);
        }
        if (!wanted) return;
        const Rows rows = ready(thread, head_matrix(), x, stride, wanted, chosen, vector(0, kFinalNorm), vector(0, kFinalNormBias));
        each(thread, [&](int index) {
            const int begin = index * block(), end = std::min(shape.vocab, begin + block()), seen = std::min(end, ids);
            for (int panel = begin / kPanel; panel * kPanel < end; panel++)
                multiply(head_matrix(), panel, rows, wanted, nullptr, logits, logits_stride, false);
            for (int r = 0; r < wanted; r++) {
                float* row = logits + r * logits_stride;
                if (shape.logit_cap > 0)
                    for (int n = begin; n < end; n++) row[n] = shape.logit_cap * std::tanh(row[n] / shape.logit_cap);
                LogSum& part = parts[r * blocks() + index] = {-std::numeric_limits<float>::infinity(), 0};
                if (begin < seen) kernels->log_sum(row + begin, seen - begin, &part.maximum, &part.total);
            }
        });
    }

    // Of the logits of each row and what is known of their blocks: the first largest one, and log of the sum of all exponentials.
    void conclude(int wanted, int ids, const float* logits, int64_t stride, int32_t* best, float* log_total) const {
        const int count = blocks();
        for (int r = 0; r < wanted; r++, logits += stride) {
            const LogSum* row = parts.data() + r * count;
            const LogSum* top = row;
            float total = 0;
            for (int b = 1; b < count; b++)
                if (row[b].maximum > top->maximum) top = row + b;
            for (int b = 0; b < count; b++)
                if (row[b].total != 0) total += row[b].total * std::exp(row[b].maximum - top->maximum);
            const int begin = int(top - row) * block();
            best[r] = int(std::find(logits + begin, logits + std::min(ids, begin + block()), top->maximum) - logits);
            if (best[r] >= ids) best[r] = 0;  // no number at all: any will do
            log_total[r] = top->maximum + std::log(total);
        }
    }

    void deal() {
        for (Ready& thread : own) thread.step = 0;
        while (shares.size() < layers.size() * 5 + 1) shares.emplace_back(team.size());
        size_t step = 0;
        for (const Layer& layer : layers) {
            shares[step++].deal(layer.matrices[kQkv].panels());
            shares[step++].deal(int(tiles.size()) * shape.kv_heads);
            for (int name : {kOut, kUp, kDown}) shares[step++].deal(layer.matrices[name].panels());
        }
        shares[step].deal(blocks());
    }

    // ---- a chunk ---------------------------------------------------------------------------------------------------

    void prepare_chunk(int longest) {
        const int64_t count = tokens.size();
        auto grow = [](std::vector<float>& v, int64_t size) { if (int64_t(v.size()) < size) v.resize(size); };
        const std::pair<float**, int> parts[] = {{&x, shape.width}, {&qkv, (shape.heads + 2 * shape.kv_heads) * shape.head_width},
                                                 {&z, shape.heads * shape.head_width}, {&hidden, shape.hidden}, {&gate, shape.gated ? shape.hidden : 0}};
        int64_t floats = 0;
        for (const auto& [name, width] : parts) floats += count * round_up(width, kPanel);
        if (room.bytes() < 4 * floats) room = Memory(4 * floats);
        float* place = reinterpret_cast<float*>(room.get());
        for (const auto& [name, width] : parts) *name = place, place += count * round_up(width, kPanel);
        for (auto& s : scratch) grow(s, attend_scratch(longest, shape.head_width));
        auto make_room = [&](const Matrix& matrix) {  // here, and not in the threads: there nobody could say that there is none
            reserve(common, int(count), matrix, shape.planes);
            for (Ready& thread : own) {
                reserve(thread, std::min<int>(int(count), kAlone), matrix, shape.planes);
                grow(thread.row, std::max(matrix.K, cache.key_inputs()));
            }
        };
        make_room(head_matrix());
        for (const Layer& layer : layers)
            for (const Matrix& matrix : layer.matrices) make_room(matrix);
        std::set<const Sequence*> different;
        for (const Token& token : tokens)
            if (!(strangers = different.insert(token.sequence).second)) break;
        tiles.clear();
        const int most = std::max(1, kQueries / (shape.heads / shape.kv_heads));
        for (int t = 0; t < count; t++) {
            const bool goes_on = !tiles.empty() && tokens[t].sequence == tokens[tiles.back().first].sequence && tiles.back().count < most;
            if (goes_on) tiles.back().count++;
            else tiles.push_back({t, 1});
        }
        deal();
    }

    void forward(int count, const int32_t* ids_in, const int32_t* texts, int wanted, const int32_t* chosen, int ids, float* logits,
                 int64_t stride, int32_t* best, float* log_total) {
        std::lock_guard<std::mutex> lock(mutex);
        check(count, ids_in, texts, wanted, chosen, ids, stride);
        std::map<int32_t, int> before;
        for (int t = 0; t < count; t++) before[texts[t]] = sequences.at(texts[t]).length;
        try {
            chunks(count, ids_in, texts, wanted, chosen, ids, logits, stride, best, log_total);
        } catch (...) {  // no memory: what was begun is forgotten
            for (const auto& [name, length] : before) sequences.at(name).rewind(length);
            throw;
        }
    }

    void chunks(int count, const int32_t* ids_in, const int32_t* texts, int wanted, const int32_t* chosen, int ids, float* logits,
                int64_t stride, int32_t* best, float* log_total) {
        int done = 0;
        for (int begin = 0; begin < count; begin += kChunk) {
            const int end = std::min(count, begin + kChunk);
            int longest = 0;
            tokens.clear();
            for (int t = begin; t < end; t++) {
                Sequence& sequence = sequences.at(texts[t]);
                tokens.push_back({ids_in[t], &sequence, sequence.extend(pool)});
                longest = std::max(longest, sequence.length);
            }
            prepare_chunk(longest);
            std::vector<int32_t> rows;
            for (; done + int(rows.size()) < wanted && chosen[done + rows.size()] < end;) rows.push_back(chosen[done + rows.size()] - begin);
            const int found = int(rows.size());
            parts.resize(std::max<size_t>(parts.size(), found * blocks()));
            team.run([&](int thread) { pass(thread, found, rows.data(), ids, logits + done * stride, stride); });
            conclude(found, ids, logits + done * stride, stride, best + done, log_total + done);
            done += found;
        }
    }

    void check(int count, const int32_t* ids_in, const int32_t* texts, int wanted, const int32_t* chosen, int ids, int64_t stride) const {
        std::map<int32_t, int> added;
        for (int t = 0; t < count; t++) {
            if (ids_in[t] < 0 || ids_in[t] >= shape.vocab) fail("token " + std::to_string(ids_in[t]) + " is not in the vocabulary of " + std::to_string(shape.vocab));
            auto found = sequences.find(texts[t]);
            if (found == sequences.end()) fail("there is no sequence " + std::to_string(texts[t]));
            if (found->second.length + ++added[texts[t]] > shape.context) fail("context is " + std::to_string(shape.context) + " tokens; got more");
        }
        for (int r = 0; r < wanted; r++)
            if (chosen[r] < (r ? chosen[r - 1] + 1 : 0) || chosen[r] >= count) fail("rows that are wanted must ascend and be given");
        if (ids < 1 || ids > shape.vocab || stride < round_up(shape.vocab, kPanel)) fail("room for the logits is too small");
    }

    Matrix& matrix(int layer, int name) {
        if (name < 0 || name >= kMatrices || layer < 0 || layer >= shape.layers) fail("there is no such matrix");
        return name == kHead ? head : name == kEmbedding ? embedding : layers[layer].matrices[name];
    }
};

// ---- the C interface ---------------------------------------------------------------------------------------------------

static thread_local std::string message;

template <class Work>
static auto guarded(Work work, decltype(work()) failed) -> decltype(work()) {
    try {
        return work();
    } catch (const std::exception& error) {
        message = error.what();
        return failed;
    }
}

// work(matrix, panel, row, count) for each panel that these outputs are; row counts from the first of them.
template <class Work>
static int32_t fill(glass_engine* engine, int layer, int name, int first, int rows, bool codes, Work work) {
    return guarded([&] {
        Matrix& matrix = engine->matrix(layer, name);
        if (matrix.is_coded() != codes) fail("a matrix of floats cannot be filled with codes, nor one of codes with floats");
        if (first % kPanel || first + rows > matrix.N) fail("rows do not fit the matrix");
        engine->team.run([&](int thread) {
            const auto [begin, end] = engine->team.part((rows + kPanel - 1) / kPanel, thread);
            for (int p = begin; p < end; p++) work(matrix, first / kPanel + p, p * kPanel, std::min(kPanel, rows - p * kPanel));
        });
        return 0;
    }, -1);
}

extern "C" {

const char* glass_error() { return message.c_str(); }

glass_engine* glass_new(const glass_shape* shape, int32_t threads, const char* kernels) {
    return guarded([&]() -> glass_engine* {
        const Kernels* found = find_kernels(kernels);
        if (!found) fail(std::string("no kernels ") + (kernels ? kernels : "") + " for this machine; there are: " + glass_kernels());
        if (threads < 1) fail("threads must be at least 1");
        return new glass_engine(*shape, threads, found);
    }, nullptr);
}

void glass_free(glass_engine* engine) { delete engine; }
const char* glass_engine_kernels(const glass_engine* engine) { return engine->kernels->name; }
int64_t glass_bytes(const glass_engine* engine) { return engine->arena.bytes(); }

int32_t glass_matrix_new(glass_engine* engine, int32_t layer, int32_t name, int32_t format, int32_t N, int32_t K, int32_t group) {
    return guarded([&] {
        if (group % 8 || N < 1 || K < 1) fail("a matrix needs at least one row and column, and groups of a multiple of 8");
        engine->matrix(layer, name) = Matrix(Format(format), N, K, group, engine->arena);
        return 0;
    }, -1);
}

int32_t glass_matrix_fill(glass_engine* engine, int32_t layer, int32_t name, int32_t first, int32_t rows, int32_t number, const void* values,
                          int64_t row_step, int64_t column_step) {
    const Stored stored = {Number(number), values, row_step, column_step};
    return fill(engine, layer, name, first, rows, false, [&](Matrix& matrix, int panel, int row, int count) {
        matrix.fill(panel, count, stored.from_row(row));
    });
}

int32_t glass_matrix_fill_codes(glass_engine* engine, int32_t layer, int32_t name, int32_t first, int32_t rows, const uint8_t* codes, const float* scales) {
    return fill(engine, layer, name, first, rows, true, [&](Matrix& matrix, int panel, int row, int count) {
        matrix.fill(panel, count, codes + row * matrix.code_row_bytes(), scales + int64_t(row) * matrix.groups);
    });
}

int32_t glass_vector_set(glass_engine* engine, int32_t layer, int32_t name, const float* values, int64_t count) {
    return guarded([&] {
        if (name < 0 || name >= kVectors || layer < 0 || layer >= engine->shape.layers) fail("there is no such vector");
        auto& vector = name < kFinalNorm ? engine->layers[layer].vectors[name] : engine->vectors[name];
        vector.assign(values, values + count);
        vector.resize((count + kPanel - 1) / kPanel * kPanel);  // biases are added a panel at a time
        return 0;
    }, -1);
}

int32_t glass_window_set(glass_engine* engine, int32_t layer, int32_t tokens) {
    return guarded([&] {
        engine->layers.at(layer).window = tokens;
        return 0;
    }, -1);
}

int32_t glass_sequence_new(glass_engine* engine) {
    std::lock_guard<std::mutex> lock(engine->mutex);
    return guarded([&] {
        engine->sequences[engine->next_sequence];
        return engine->next_sequence++;
    }, -1);
}

int32_t glass_sequence_fork(glass_engine* engine, int32_t sequence) {
    std::lock_guard<std::mutex> lock(engine->mutex);
    return guarded([&] {
        Sequence copy = engine->sequences.at(sequence);
        engine->sequences[engine->next_sequence] = std::move(copy);
        return engine->next_sequence++;
    }, -1);
}

int32_t glass_sequence_rewind(glass_engine* engine, int32_t sequence, int32_t length) {
    std::lock_guard<std::mutex> lock(engine->mutex);
    return guarded([&] {
        Sequence& found = engine->sequences.at(sequence);
        if (length < 0 || length > found.length) fail("a sequence of " + std::to_string(found.length) + " cannot be cut to " + std::to_string(length));
        found.rewind(length);
        return 0;
    }, -1);
}

int32_t glass_sequence_length(glass_engine* engine, int32_t sequence) {
    std::lock_guard<std::mutex> lock(engine->mutex);
    return guarded([&] { return int32_t(engine->sequences.at(sequence).length); }, -1);
}

int32_t glass_sequence_free(glass_engine* engine, int32_t sequence) {
    std::lock_guard<std::mutex> lock(engine->mutex);
    return engine->sequences.erase(sequence) ? 0 : -1;
}

int64_t glass_cache_bytes(glass_engine* engine) {
    std::lock_guard<std::mutex> lock(engine->mutex);
    std::map<const Page*, int> pages;
    for (const auto& [name, sequence] : engine->sequences)
        for (const auto& page : sequence.pages) pages[page.get()]++;
    return int64_t(pages.size()) * engine->cache.page_bytes();
}

int32_t glass_forward(glass_engine* engine, int32_t count, const int32_t* tokens, const int32_t* sequences, int32_t wanted, const int32_t* rows,
                      int32_t ids, float* logits, int64_t stride, int32_t* best, float* log_total) {
    return guarded([&] {
        engine->forward(count, tokens, sequences, wanted, rows, ids, logits, stride, best, log_total);
        return 0;
    }, -1);
}

int32_t glass_draw(const glass_engine* engine, const float* logits, int32_t ids, int32_t best, double temperature, int32_t top_k, double top_p,
                   double min_p, double point) {
    return guarded([&] { return draw(*engine->kernels, logits, ids, best, {temperature, top_k, top_p, min_p}, point); }, -1);
}

int64_t glass_floats(int32_t number, const void* from, int64_t rows, int64_t columns, int64_t row_step, int64_t column_step, float* to) {
    return Stored{Number(number), from, row_step, column_step}.read([&](auto get) {
        int64_t useless = 0;
        for (int64_t r = 0; r < rows; r++)
            for (int64_t c = 0; c < columns; c++) {
                const float value = to[r * columns + c] = get(r, c);
                useless += (value == 0) | !(std::fabs(value) <= std::numeric_limits<float>::max());  // no branch
            }
        return useless;
    });
}

double glass_bandwidth(int64_t bytes, int32_t threads) {
    return guarded([&] {
        const Kernels* kernels = find_kernels(nullptr);
        Team team(threads);
        const int64_t share = bytes / threads / 4096 * 4096, rounds = std::max<int64_t>(1, (int64_t(256) << 20) / bytes);
        Memory memory(share * threads);
        std::memset(memory.get(), 1, share * threads);
        std::atomic<uint64_t> sum{0};
        auto work = [&](int thread) {
            for (int64_t r = 0; r < rounds; r++) sum += kernels->read(memory.get() + share * thread, share);
        };
        team.run(work);
        auto start = std::chrono::steady_clock::now();
        team.run(work);
        return double(share) * threads * rounds / std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    }, -1.0);
}

double glass_rate(int32_t format, int32_t threads, const char* name) {
    return guarded([&] {
        const Kernels* kernels = find_kernels(name);
        if (!kernels) fail("no such kernels");
        Team team(threads);
        std::vector<double> rates(threads);
        team.run([&](int thread) { rates[thread] = kernels->rate(Format(format)); });
        double total = 0;
        for (double rate : rates) total += rate;
        return total;
    }, -1.0);
}
}
