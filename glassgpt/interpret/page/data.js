// The report of this page, with its arrays unpacked.

const HALVES = Float32Array.from({ length: 65536 }, (_, bits) => half(bits));

/** Little-endian numbers from base64, as `html._packed` wrote them (every browser of today counts bytes that way itself). */
function unpacked(packed) {
  if (packed === null) return null;
  const text = atob(packed.data);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = text.charCodeAt(i);
  if (packed.kind === "u1") return bytes;
  if (packed.kind === "i4") return new Int32Array(bytes.buffer);
  if (packed.kind === "f4") return new Float32Array(bytes.buffer);
  const halves = new Uint16Array(bytes.buffer);
  const numbers = new Float32Array(halves.length);
  for (let i = 0; i < halves.length; i++) numbers[i] = HALVES[halves[i]];
  return numbers;
}

const report = JSON.parse(document.getElementById("report").textContent);
const config = report.config;
const L = config.n_layer;
const H = config.n_head;
const G = config.kv_heads;
const T = report.tokens.length;
const V = config.vocab_size;
const stages = { scores: unpacked(report.scores), masked: unpacked(report.masked), pattern: unpacked(report.pattern) };
const slabs = unpacked(report.slabs);
const logits = unpacked(report.logits);
const lens = Object.fromEntries(Object.entries(report.lens).map(([name, packed]) => [name, unpacked(packed)]));
const K = lens.ids.length / ((L + 1) * T); // tokens kept in a cell

/** Attention of one head from a query to a key at a stage; what the future holds is known of the scores alone. */
function attention(stage, layer, head, query, key) {
  const index = layer * H + head;
  if (stage === "scores") return stages.scores[(index * T + query) * T + key];
  if (key > query) return stage === "pattern" ? 0 : -Infinity;
  return stages[stage][(index * T * (T + 1)) / 2 + (query * (query + 1)) / 2 + key];
}

/** One cell of the logit lens: row 0 is the embedding, row l the stream after block l - 1. */
function lensCell(row, position) {
  const cell = row * T + position;
  const top = Array.from({ length: K }, (_, k) => ({
    id: lens.ids[cell * K + k],
    probability: lens.probabilities[cell * K + k],
  }));
  return { top, rank: lens.rank[cell], kl: lens.kl_bits[cell], entropy: lens.entropy_bits[cell] };
}

/** Heads with their scores, layer by layer; only their places where the model has no room for the test that scores them. */
const isScored = report.heads.length > 0;
const heads = isScored
  ? report.heads
  : Array.from({ length: L * H }, (_, i) => ({ layer: Math.floor(i / H), head: i % H }));
const headScore = (layer, head) => heads[layer * H + head];

/** The head with the highest induction score, the first where there are no scores. */
function bestHead() {
  const { layer, head } = heads.reduce((a, b) => (b.induction > a.induction ? b : a));
  return { layer, head };
}

const label = (id) => report.labels[id];
