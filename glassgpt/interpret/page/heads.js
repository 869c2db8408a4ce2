// All heads at once: one small picture each, in the order of layers or of a score.

const SORTS = ["layer", "induction", "previous", "duplicate", "entropy_bits"];
const MEASURES = ["induction", "previous", "duplicate"];
const headName = (layer, head) => `L${layer} H${head}`;
const headLabel = (score) =>
  `${headName(score.layer, score.head)}, ${t("heads.scores", Object.fromEntries(MEASURES.map((name) => [name, fixed(score[name])])))}`;

const axis = (role, text) => make("span", { role, class: "axis", translate: "no" }, text);

/** The heads as they are shown, row by row. */
function sortedHeads() {
  if (state.sort === "layer") return report.heads;
  const sign = state.sort === "entropy_bits" ? 1 : -1; // sharp heads first, high scores first
  return [...report.heads].sort((a, b) => sign * (a[state.sort] - b[state.sort]));
}

/** A T x T picture of one head at a stage. */
function picture(stage, layer, head) {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = T;
  const image = new ImageData(T, T);
  const pixels = new Uint32Array(image.data.buffer);
  const pixel = pixelOf(stage, layer, head);
  for (let query = 0; query < T; query++)
    for (let key = 0; key < T; key++) pixels[query * T + key] = pixel(attention(stage, layer, head, query, key));
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

const STEPS = 255; // of the colours of weights
const packed = ([red, green, blue]) => (255 << 24) | (Math.round(blue) << 16) | (Math.round(green) << 8) | Math.round(red);
const palettes = {}; // by theme: every picture needs it

/** What pixel a number of this head becomes at a stage. */
function pixelOf(stage, layer, head) {
  if (stage === "pattern") {
    const theme = colourScheme();
    palettes[theme] ??= Uint32Array.from({ length: STEPS + 1 }, (_, i) => packed(weightColour(i / STEPS)));
    return (p) => palettes[theme][Math.round(p * STEPS)];
  }
  const hidden = packed(hiddenColour());
  const most = largestScore(stage, layer, head);
  return (x) => (x === -Infinity ? hidden : packed(diverging(x / most)));
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
  const heads = sortedHeads();
  const isByLayer = state.sort === "layer";
  const rows = Array.from({ length: L }, (_, row) => heads.slice(row * H, (row + 1) * H));
  const header = isByLayer
    ? [
        make(
          "div",
          { role: "row", class: "row" },
          make("span", { class: "corner" }),
          ...Array.from({ length: H }, (_, h) => axis("columnheader", `H${h}`)),
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
  box.style.setProperty("--columns", H);
  box.closest(".attention").classList.toggle("many", H > 8);
  box.classList.toggle("ranked", !isByLayer);
  box.replaceChildren(...header, ...cells);
  if (hadFocus) box.querySelector("[aria-selected=true]").focus({ preventScroll: true });
}

function headCell(score) {
  const isSelected = score.layer === state.layer && score.head === state.head;
  const image = picture("pattern", score.layer, score.head);
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
    const heads = sortedHeads();
    const here = heads.findIndex(({ layer, head }) => layer === state.layer && head === state.head);
    if (event.key === "Enter") find("pattern").focus();
    const next = moved(event, here, H, heads.length);
    if (next === null) return;
    event.preventDefault();
    change({ layer: heads[next].layer, head: heads[next].head });
  });
}
