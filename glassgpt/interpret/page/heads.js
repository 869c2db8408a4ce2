// All heads at once: one small picture each, in the order of layers or of a score.

const SORTS = isScored ? ["layer", "induction", "previous", "duplicate", "entropy_bits"] : ["layer"];
const MOST_ACROSS = 5; // heads beside each other in the order of a score: more would need scrolling sideways
const LONG_NAMES = 12; // heads in a layer up to which there is room for H in front of their numbers
const MEASURES = ["induction", "previous", "duplicate"];
const headName = (layer, head) => `L${layer} H${head}`;

function headLabel(score) {
  const name = headName(score.layer, score.head);
  if (!isScored) return name;
  return `${name}, ${t("heads.scores", Object.fromEntries(MEASURES.map((measure) => [measure, fixed(score[measure])])))}`;
}

const axis = (role, text) => make("span", { role, class: "axis", translate: "no" }, text);

const columns = () => (state.sort === "layer" ? H : Math.min(H, MOST_ACROSS));

/** The heads as they are shown, row by row. */
function sortedHeads() {
  if (state.sort === "layer") return heads;
  const sign = state.sort === "entropy_bits" ? 1 : -1; // sharp heads first, high scores first
  return [...heads].sort((a, b) => sign * (a[state.sort] - b[state.sort]));
}

/** A T x T picture of one head at a stage. */
function picture(stage, layer, head) {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = T;
  const image = new ImageData(T, T);
  const pixels = new Uint32Array(image.data.buffer);
  if (stage === "pattern") paintWeights(pixels, layer, head);
  else paintScores(pixels, stage, layer, head);
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

const thumbnails = new Map(); // by theme and head: another order or language moves them

function thumbnail(layer, head) {
  const key = `${colourScheme()} ${headName(layer, head)}`;
  if (!thumbnails.has(key)) thumbnails.set(key, picture("pattern", layer, head));
  return thumbnails.get(key);
}

const STEPS = 255; // of the colours of weights
const packed = ([red, green, blue]) => (255 << 24) | (Math.round(blue) << 16) | (Math.round(green) << 8) | Math.round(red);
const palettes = {}; // by theme: every picture needs it

/** All heads are drawn at once, so this runs along the stored triangle, without a call for every number. */
function paintWeights(pixels, layer, head) {
  const theme = colourScheme();
  palettes[theme] ??= Uint32Array.from({ length: STEPS + 1 }, (_, i) => packed(weightColour(i / STEPS)));
  const palette = palettes[theme];
  pixels.fill(palette[0]);
  let i = ((layer * H + head) * T * (T + 1)) / 2;
  for (let query = 0; query < T; query++)
    for (let key = 0; key <= query; key++) pixels[query * T + key] = palette[Math.round(stages.pattern[i++] * STEPS)];
}

function paintScores(pixels, stage, layer, head) {
  const hidden = packed(hiddenColour());
  const most = largestScore(stage, layer, head);
  for (let query = 0; query < T; query++)
    for (let key = 0; key < T; key++) {
      const x = attention(stage, layer, head, query, key);
      pixels[query * T + key] = x === -Infinity ? hidden : packed(diverging(x / most));
    }
}

function largestScore(stage, layer, head) {
  let most = 1e-6;
  for (let query = 0; query < T; query++)
    for (let key = 0; key < T; key++) {
      const x = Math.abs(attention(stage, layer, head, query, key));
      if (x > most && x < Infinity) most = x;
    }
  return most;
}

function drawHeads() {
  const shown = sortedHeads();
  const isByLayer = state.sort === "layer";
  const across = columns();
  const rows = Array.from({ length: Math.ceil(shown.length / across) }, (_, i) => shown.slice(i * across, (i + 1) * across));
  const header = isByLayer
    ? [
        make(
          "div",
          { role: "row", class: "row" },
          make("span", { class: "corner" }),
          ...Array.from({ length: H }, (_, h) => axis("columnheader", H > LONG_NAMES ? h : `H${h}`)),
        ),
      ]
    : [];
  const cells = rows.map((row, l) =>
    make(
      "div",
      { role: "row", class: "row" },
      isByLayer ? axis("rowheader", `L${l}`) : make("span", { class: "corner" }),
      ...row.map(headCell),
    ),
  );
  const box = find("heads");
  const hadFocus = box.contains(document.activeElement);
  box.style.setProperty("--columns", across);
  box.closest(".attention").classList.toggle("many", H > 8);
  box.classList.toggle("ranked", !isByLayer);
  box.replaceChildren(...header, ...cells);
  if (hadFocus) box.querySelector("[aria-selected=true]").focus({ preventScroll: true });
}

function headCell(score) {
  const isSelected = score.layer === state.layer && score.head === state.head;
  const image = thumbnail(score.layer, score.head);
  image.setAttribute("aria-hidden", "true");
  const value = score[state.sort];
  const caption =
    state.sort === "layer"
      ? []
      : [make("small", { translate: "no" }, `${score.layer}.${score.head}`, make("b", {}, fixed(value)))];
  return make(
    "div",
    {
      role: "gridcell",
      class: "cell",
      tabindex: isSelected ? 0 : -1,
      "aria-selected": String(isSelected),
      "aria-label": headLabel(score),
      "data-head": `${score.layer}.${score.head}`,
      title: headLabel(score),
      click: () => change({ layer: score.layer, head: score.head }),
    },
    image,
    ...caption,
  );
}

/** Another head: only marks change, not the pictures. */
function markHead() {
  const box = find("heads");
  const hadFocus = box.contains(document.activeElement);
  for (const cell of box.querySelectorAll(".cell")) {
    const isSelected = cell.dataset.head === `${state.layer}.${state.head}`;
    cell.setAttribute("aria-selected", String(isSelected));
    cell.tabIndex = isSelected ? 0 : -1;
    if (isSelected && hadFocus) cell.focus({ preventScroll: true });
  }
}

function startHeads() {
  segments("sorts", "sort", SORTS, (name) => t(`sort.${name}`));
  watch(["sort"], drawHeads);
  watch(["layer", "head"], markHead);
  find("heads").addEventListener("keydown", (event) => {
    const shown = sortedHeads();
    const here = shown.findIndex(({ layer, head }) => layer === state.layer && head === state.head);
    if (event.key === "Enter") find("pattern").focus();
    const next = moved(event, here, columns(), shown.length);
    if (next === null) return;
    event.preventDefault();
    change({ layer: shown[next].layer, head: shown[next].head });
  });
}
