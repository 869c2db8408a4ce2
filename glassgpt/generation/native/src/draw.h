// From logits to a token: what `glassgpt/generation/sampling.py` says, in a few passes over the vocabulary.
#pragma once
#include "kernels.h"

struct Sampling {
    double temperature;  // above 0
    int top_k;           // 0: all
    double top_p, min_p;
};

// One of n ids, drawn by `point` (at least 0, below 1) from the distribution that the logits and the rules give. `best` is the
// first largest logit's.
int draw(const Kernels&, const float* logits, int n, int best, const Sampling&, double point);
