"use strict";
// Pure functions of numbers. The tests compare them with their namesakes in Python.

const SMALLEST = 2 ** -1022; // the smallest normal number: what a temperature just above 0 counts as

/** Indices of numbers from the largest to the smallest, the lower index first among equals. */
function descending(numbers) {
  return Uint32Array.from(numbers.keys()).sort((a, b) => (numbers[a] === numbers[b] ? a - b : numbers[b] > numbers[a] ? 1 : -1));
}

/**
 * The probabilities that the next token is drawn from: temperature, then top-k (0: all), then top-p (1: all), over the whole
 * vocabulary. Temperature 0 puts everything on the first largest logit. The same as `generation.sampling.distribution`.
 */
function distribution(logits, { temperature = 1, topK = 0, topP = 1 } = {}, order = descending(logits)) {
  const p = new Float64Array(logits.length);
  if (temperature === 0) {
    p[order[0]] = 1;
    return p;
  }
  const largest = logits[order[0]];
  const scaled = Float64Array.from(logits, (logit) => (logit - largest) / Math.max(temperature, SMALLEST)); // at most 0: no overflow
  const least = topK > 0 && topK < logits.length ? scaled[order[topK - 1]] : -Infinity;
  for (const i of order) p[i] = scaled[i] < least ? 0 : Math.exp(scaled[i]);
  normalise(p);
  if (topP < 1) {
    let reached = 0;
    for (const i of order) {
      reached += p[i];
      if (reached - p[i] >= topP) p[i] = 0; // the token that crosses p stays
    }
    normalise(p);
  }
  return p;
}

function normalise(p) {
  const total = p.reduce((sum, x) => sum + x, 0);
  for (let i = 0; i < p.length; i++) p[i] /= total;
}

/** Shannon entropy in bits. */
function entropyBits(p) {
  return p.reduce((sum, x) => (x > 0 ? sum - x * Math.log2(x) : sum), 0);
}

/** The number that sixteen bits stand for (IEEE 754 binary16). */
function half(bits) {
  const sign = bits >> 15 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return exponent === 0 ? sign * fraction * 2 ** -24 : sign * (1024 + fraction) * 2 ** (exponent - 25);
}
