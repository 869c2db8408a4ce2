// Drives the native engine through its C interface with random tiny models, for the sanitizers: every format of matrix and cache,
// several texts that are copied, cut and dropped. It compares as well: any number of threads and any batch must give the same bits.
#include "draw.h"
#include "engine.h"
#include "kernels.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

const Kernels* find_kernels(const char* name);

static std::mt19937 random_bits(1);

static std::vector<float> numbers(int64_t n, float size = 0.3f) {
    std::normal_distribution<float> normal(0, size);
    std::vector<float> x(n);
    for (float& value : x) value = normal(random_bits);
    return x;
}

static void must(bool holds, const std::string& what) {
    if (holds) return;
    std::fprintf(stderr, "%s (%s)\n", what.c_str(), glass_error());
    std::exit(1);
}

struct Case {
    const char* name;
    int format, group, cache, planes, heads, kv_heads, head_width, width, hidden, vocab;
    bool gated, rope, distance, window, untied;
};

static void put_matrix(glass_engine* engine, const Case& c, int layer, int name, int N, int K, int format) {
    const bool coded = format >= kInt8;
    const int group = coded && c.group && K % c.group == 0 ? c.group : 0;
    must(glass_matrix_new(engine, layer, name, format, N, K, group) == 0, "matrix");
    std::vector<float> values = numbers(int64_t(N) * K), scales = numbers(int64_t(N) * (group ? K / group : 1), 0.01f);
    const int row_bytes = format == kInt4 ? (K + 1) / 2 : K;
    std::vector<uint8_t> codes(int64_t(N) * row_bytes);
    for (auto& code : codes) code = format == kInt4 ? random_bits() % 256 : 1 + random_bits() % 255;
    for (int first = 0; first < N; first += 128) {  // in pieces, as Python does
        const int rows = std::min(128, N - first);
        const int found = coded ? glass_matrix_fill_codes(engine, layer, name, first, rows, codes.data() + int64_t(first) * row_bytes,
                                                          scales.data() + int64_t(first) * (group ? K / group : 1))
                                : glass_matrix_fill(engine, layer, name, first, rows, 0, values.data() + int64_t(first) * K, K, 1);
        must(found == 0, "fill");
    }
}

static void put_vector(glass_engine* engine, int layer, int name, int64_t n) {
    std::vector<float> x = numbers(n);
    must(glass_vector_set(engine, layer, name, x.data(), n) == 0, "vector");
}

static glass_engine* made(const Case& c, int threads, const char* kernels) {
    const int context = 150, layers = 2;
    glass_shape shape = {c.vocab, context, layers, c.width, c.heads, c.kv_heads, c.head_width, c.hidden, c.gated, c.gated,
                         c.gated ? kSwiglu : kGelu, c.cache, c.planes, 1e-5f, 0.3f, c.gated ? 5.0f : 0.0f};
    glass_engine* engine = glass_new(&shape, threads, kernels);
    must(engine, "new");
    random_bits.seed(7);
    const int A = c.heads * c.head_width, qkv = A + 2 * c.kv_heads * c.head_width;
    for (int layer = 0; layer < layers; layer++) {
        put_matrix(engine, c, layer, kQkv, qkv, c.width, c.format);
        put_matrix(engine, c, layer, kOut, c.width, A, c.format);
        put_matrix(engine, c, layer, kUp, c.hidden, c.width, c.format);
        if (c.gated) put_matrix(engine, c, layer, kGate, c.hidden, c.width, c.format);
        put_matrix(engine, c, layer, kDown, c.width, c.hidden, c.format);
        for (int name : {kNorm1, kNorm1Bias, kNorm2, kNorm2Bias, kOutBias, kDownBias}) put_vector(engine, layer, name, c.width);
        put_vector(engine, layer, kQkvBias, qkv);
        put_vector(engine, layer, kUpBias, c.hidden);
        if (c.distance) put_vector(engine, layer, kDistance, int64_t(c.heads) * context);
        if (c.window) must(glass_window_set(engine, layer, 9) == 0, "window");
        if (c.gated)
            for (int name : {kQueryNorm, kKeyNorm}) put_vector(engine, layer, name, c.head_width);
    }
    for (int name : {kFinalNorm, kFinalNormBias}) put_vector(engine, 0, name, c.width);
    put_matrix(engine, c, 0, kEmbedding, c.vocab, c.width, c.format);
    if (c.untied) put_matrix(engine, c, 0, kHead, c.vocab, c.width, kInt8);
    if (c.rope)
        for (int name : {kCosine, kSine}) put_vector(engine, 0, name, int64_t(context) * (c.head_width / 2));
    else put_vector(engine, 0, kPosition, int64_t(context) * c.width);
    return engine;
}

struct Text {
    int32_t number;
    std::vector<int32_t> ids;
};

// What a whole forward pass of one text gives after its last token: of a fresh engine, of one thread.
static std::vector<float> alone(glass_engine* engine, const Case& c, const std::vector<int32_t>& ids) {
    const int stride = round_up(c.vocab, kPanel);
    std::vector<float> logits(stride);
    const int32_t number = glass_sequence_new(engine), last = int32_t(ids.size()) - 1;
    std::vector<int32_t> texts(ids.size(), number);
    int32_t best;
    float total;
    must(glass_forward(engine, int(ids.size()), ids.data(), texts.data(), 1, &last, c.vocab, logits.data(), stride, &best, &total) == 0, "alone");
    must(glass_sequence_free(engine, number) == 0, "free");
    logits.resize(c.vocab);
    return logits;
}

static void play(const Case& c, int threads, const char* kernels) {
    const std::string name = std::string(c.name) + ", " + kernels + ", threads " + std::to_string(threads);
    glass_engine *engine = made(c, threads, kernels), *other = made(c, 1, kernels);
    const int stride = round_up(c.vocab, kPanel);
    std::vector<Text> texts;
    std::mt19937 dice(11);
    for (int turn = 0; turn < 10; turn++) {
        const int what = dice() % 5;
        if (texts.size() < 2 || (what == 0 && texts.size() < 5)) texts.push_back({glass_sequence_new(engine), {}});
        else if (what == 1 && texts.size() < 5) {
            const Text from = texts[dice() % texts.size()];
            texts.push_back({glass_sequence_fork(engine, from.number), from.ids});
            must(texts.back().number > 0, "fork");
        } else if (what == 2) {
            Text& text = texts[dice() % texts.size()];
            text.ids.resize(dice() % (text.ids.size() + 1));
            must(glass_sequence_rewind(engine, text.number, int(text.ids.size())) == 0, "rewind");
        } else if (what == 3) {
            must(glass_sequence_free(engine, texts.back().number) == 0, "free");
            texts.pop_back();
        }
        std::vector<int32_t> ids, numbers, wanted;
        for (Text& text : texts) {
            const int most = 149 - int(text.ids.size()), count = std::min(most, turn % 3 ? 1 + int(dice() % 3) : 1 + int(dice() % 60));
            for (int i = 0; i < count; i++) {
                ids.push_back(dice() % c.vocab);
                text.ids.push_back(ids.back());
                numbers.push_back(text.number);
            }
            if (count > 0) wanted.push_back(int(ids.size()) - 1);
        }
        std::vector<float> logits(wanted.size() * stride), total(wanted.size());
        std::vector<int32_t> best(wanted.size());
        must(glass_forward(engine, int(ids.size()), ids.data(), numbers.data(), int(wanted.size()), wanted.data(), c.vocab - 1, logits.data(), stride,
                           best.data(), total.data()) == 0, "forward");
        for (size_t i = 0; i < wanted.size(); i++) {
            const Text* text = &texts[0];
            for (const Text& one : texts)
                if (one.number == numbers[wanted[i]]) text = &one;
            const std::vector<float> expected = alone(other, c, text->ids);
            must(!std::memcmp(expected.data(), logits.data() + i * stride, 4 * c.vocab), name + ": other bits in turn " + std::to_string(turn));
            must(best[i] >= 0 && best[i] < c.vocab - 1, "best");
        }
    }
    must(glass_cache_bytes(engine) > 0, "cache");
    must(glass_forward(engine, 1, &c.vocab, &texts[0].number, 0, nullptr, 1, nullptr, stride, nullptr, nullptr) < 0, "a token that is none");
    must(glass_sequence_rewind(engine, texts[0].number, 1000) < 0, "a rewind forwards");
    glass_free(engine);  // with texts in it
    glass_free(other);
}

// Where numbers happen to lie in memory changes no bit.
static void anywhere(const char* name) {
    const Kernels* kernels = find_kernels(name);
    const int n = 203;
    const std::vector<float> x = numbers(n), weight = numbers(n), bias = numbers(n);
    std::vector<float> room(n + 16), y(n + 16), first;
    for (int shift = 0; shift < 16; shift++) {
        float* to = room.data() + shift;
        std::memcpy(to, x.data(), 4 * n);
        std::vector<float> found(n + 2);
        kernels->norm(to, n, false, 1e-5f, weight.data(), bias.data(), y.data() + 15 - shift);
        std::memcpy(found.data(), y.data() + 15 - shift, 4 * n);
        kernels->log_sum(to, n, &found[n], &found[n + 1]);
        kernels->activate(kGelu, to, nullptr, n / kPanel * kPanel);
        for (int i = 0; i < n; i++) found[i] += to[i];
        if (first.empty()) first = found;
        must(!std::memcmp(first.data(), found.data(), 4 * found.size()), std::string("bits depend on addresses: ") + name);
    }
}

// Numbers that are none, or hardly any: whatever comes out, nothing undefined is done on the way.
static void strange(const char* name) {
    const Kernels* kernels = find_kernels(name);
    const float infinite = std::numeric_limits<float>::infinity();
    for (float value : {std::numeric_limits<float>::quiet_NaN(), infinite, -infinite, -3e38f, 1e-38f, 1e-45f, 0.0f}) {
        std::vector<float> x = numbers(70, value == value && std::abs(value) < 1 ? 1e-40f : 1.0f), y(70), scale(1);
        x[3] = x[66] = value;
        std::vector<int8_t> codes(2 * 72);
        std::vector<int32_t> sums(2);
        for (int planes : {1, 2}) kernels->prepare(kInt8, planes, x.data(), 70, 72, 72, codes.data(), scale.data(), sums.data());
        kernels->norm(x.data(), 70, true, 1e-5f, x.data(), nullptr, y.data());
        float maximum, total;
        kernels->log_sum(y.data(), 70, &maximum, &total);
        const std::vector<float> all(70, value);
        kernels->log_sum(all.data(), 70, &maximum, &total);
        must(value != value || value == infinite || (maximum == value && std::abs(total - (value == -infinite ? 0 : 70)) < 1e-3f), "sum of all alike");
        for (Activation kind : {kGelu, kSwiglu, kRelu2}) kernels->activate(kind, y.data(), x.data(), 2 * kPanel);
    }
}

// Tokens drawn from logits that end where their memory does, by every rule; of odd numbers among them some.
static void draws(const char* name) {
    const Kernels* kernels = find_kernels(name);
    const float infinite = std::numeric_limits<float>::infinity(), none = std::numeric_limits<float>::quiet_NaN();
    for (int n : {1, 2, 15, 63, 64, 65, 200, 1000})
        for (float strange : {0.0f, infinite, -infinite, none})
            for (int top_k : {0, 1, 5, 64, 150, 5000})
                for (float top_p : {1.0f, 0.9f, 0.01f})
                    for (float min_p : {0.0f, 0.2f, 1.0f})
                        for (float temperature : {1.0f, 1e-38f, 0.0f, infinite}) {
                            std::vector<float> logits = numbers(n, 3);
                            if (strange != 0) logits[n / 2] = strange, logits[n / 3] = strange;
                            const int best = int(std::max_element(logits.begin(), logits.end()) - logits.begin());
                            for (double point : {0.0, 0.3, 0.999999999999}) {
                                const int drawn = draw(*kernels, logits.data(), n, best, {temperature, top_k, top_p, min_p}, point);
                                must(drawn >= 0 && drawn < n, "an id that is none was drawn");
                                must(strange != -infinite || std::isfinite(logits[drawn]) || n < 4, "what is impossible was drawn");
                            }
                        }
}

int main() {
    const Case cases[] = {
        //                       format     group cache     planes H  G  W   D   M    V    gated  rope   dist   window untied
        {"float32",              kFloat32,  0,    kFloat32,  2,    2, 2, 16, 32, 96,  77,  false, false, false, false, false},
        {"bfloat16, odd widths", kBfloat16, 0,    kBfloat16, 2,    3, 1, 7,  21, 50,  65,  false, false, true,  false, true},
        {"8 bits",               kInt8,     0,    kInt8,     1,    4, 2, 12, 48, 80,  130, true,  true,  false, true,  true},
        {"8 bits in groups",     kInt8,     16,   kBfloat16, 2,    2, 1, 16, 32, 64,  64,  false, false, true,  false, false},
        {"4 bits",               kInt4,     0,    kInt8,     2,    2, 2, 9,  18, 33,  31,  false, false, false, true,  false},
        {"4 bits in groups",     kInt4,     32,   kFloat32,  1,    8, 1, 8,  64, 128, 70,  true,  true,  false, false, true},
    };
    const std::string names = std::string(glass_kernels()) + " ";
    for (size_t at = 0, end; (end = names.find(' ', at)) != std::string::npos; at = end + 1) {
        const std::string name = names.substr(at, end - at);
        anywhere(name.c_str());
        strange(name.c_str());
        draws(name.c_str());
        for (const Case& c : cases)
            for (int threads : {1, 3}) play(c, threads, name.c_str());
    }
    std::puts(names.c_str());
}
