#include "draw.h"

#include <algorithm>
#include <cfloat>
#include <climits>
#include <cmath>
#include <functional>
#include <vector>

namespace {

constexpr int kBlock = 64;  // ids whose shares are added up, or searched, together

struct Candidate {
    float logit, share;
    int id;
    bool operator<(const Candidate& other) const {  // the likelier one first, of equals the earlier
        return logit > other.logit || (logit == other.logit && id < other.id);
    }
};

constexpr Candidate kNone = {-INFINITY, 0, INT_MAX};  // after all others

// The k-th largest of n logits. So many blocks have a maximum of at least the k-th largest maximum: what lies below cannot be it.
float kth_largest(const float* logits, int n, int k) {
    static thread_local std::vector<float> maxima, left;
    maxima.clear();
    for (int i = 0; i < n; i += kBlock) {
        float most = -INFINITY;
        for (int j = i; j < std::min(n, i + kBlock); j++) most = logits[j] > most ? logits[j] : most;  // passes over NaN
        maxima.push_back(most);
    }
    float least = -FLT_MAX;
    if (k <= int(maxima.size())) {
        left = maxima;
        std::nth_element(left.begin(), left.begin() + (k - 1), left.end(), std::greater<float>());
        least = left[k - 1];
    }
    left.clear();
    for (int i = 0; i < n; i += kBlock)
        if (maxima[i / kBlock] >= least)
            for (int j = i; j < std::min(n, i + kBlock); j++)
                if (logits[j] >= least) left.push_back(logits[j]);
    if (int(left.size()) < k) return -FLT_MAX;  // there are k, but some are -inf
    std::nth_element(left.begin(), left.begin() + (k - 1), left.end(), std::greater<float>());
    return left[k - 1];
}

// The last of the smallest set of likeliest tokens whose shares reach `mass`; shares below `least` cannot be in it.
Candidate last_of_nucleus(const float* logits, const float* shares, int n, double mass, double least) {
    static thread_local std::vector<Candidate> found;
    found.clear();
    for (int i = 0; i < n; i++)
        if (shares[i] > 0 && shares[i] >= least) found.push_back({logits[i], shares[i], i});
    auto begin = found.begin(), end = found.end();
    double before = 0;
    while (end - begin > 32) {  // which half is it in?
        const auto middle = begin + (end - begin) / 2;
        std::nth_element(begin, middle, end);
        double half = before;
        for (auto i = begin; i < middle; i++) half += i->share;
        if (half >= mass) end = middle;
        else before = half, begin = middle;
    }
    std::sort(begin, end);
    if (begin == end) return kNone;
    auto last = begin;
    while (last + 1 < end && (before += last->share) < mass) last++;
    return *last;
}

}  // namespace

int draw(const Kernels& kernels, const float* logits, int n, int best, const Sampling& sampling, double point) {
    static thread_local std::vector<float> shares;
    static thread_local std::vector<double> sums;  // of the blocks before, and this one
    if (!std::isfinite(logits[best])) return best;  // the caller sees by the sum of all that the logits are no numbers
    const int blocks = (n + kBlock - 1) / kBlock;
    if (int(shares.size()) < n) shares.resize(n);
    sums.resize(blocks);
    auto add_up = [&] {
        double total = 0;
        for (int b = 0; b < blocks; b++) {
            double sum[4] = {};  // side by side: one alone would wait for itself
            for (int i = b * kBlock; i < std::min(n, (b + 1) * kBlock); i++) sum[i % 4] += shares[i];
            sums[b] = total += sum[0] + sum[1] + (sum[2] + sum[3]);
        }
        return total;
    };
    const float temperature = float(std::min(std::max(sampling.temperature, double(FLT_MIN)), double(FLT_MAX))), largest = logits[best];
    kernels.shares(logits, n, largest, temperature, shares.data());
    if (sampling.top_k > 0 && sampling.top_k < n) {
        const float least = kth_largest(logits, n, sampling.top_k);
        for (int i = 0; i < n; i++)
            if (logits[i] < least) shares[i] = 0;
    }
    double total = add_up();
    Candidate last = kNone;
    if (sampling.top_p < 1)  // shares below the least are together less than what may be left out
        last = last_of_nucleus(logits, shares.data(), n, sampling.top_p * total, (1 - sampling.top_p) * total / n);
    if (sampling.top_p < 1 || sampling.min_p > 0) {
        for (int i = 0; i < n; i++)
            if (last < Candidate{logits[i], 0, i} || shares[i] < sampling.min_p) shares[i] = 0;  // the likeliest token's is 1
        total = add_up();
    }
    const double wanted = point * total;
    const int block = std::min(blocks - 1, int(std::upper_bound(sums.begin(), sums.end(), wanted) - sums.begin()));
    double reached = block > 0 ? sums[block - 1] : 0;
    int drawn = best;
    for (int i = block * kBlock; i < std::min(n, (block + 1) * kBlock); i++)
        if (shares[i] > 0) {
            drawn = i;
            if ((reached += shares[i]) > wanted) return i;
        }
    return drawn;  // rounding passed the last one of the block
}
