// The parameters: Q | K | V of a layer by head, and every tensor in numbers.

const [slabRows, slabColumns] = report.slab_shape.slice(1);
const PARTS = [
  ["Q", H],
  ["K", G],
  ["V", G],
];
const opened = new Set(["blocks.0"]);

function drawSlabs() {
  const rows = (H + 2 * G) * config.head_width;
  find("slabs-title").replaceChildren(
    term(`blocks.${state.layer}.attn.qkv.weight`, "code"),
    " ",
    term(`${whole(rows)} × ${whole(config.width)}`, "shape"),
  );
  const shared = G < H ? t("slabs.shared", { each: whole(H / G), count: whole(G) }) : "";
  find("slabs-note").textContent =
    `${t("slabs.note", { width: whole(config.head_width), most: short(report.slabs.largest[state.layer]) })} ${shared}`;
  let first = 0;
  find("slabs").replaceChildren(
    ...PARTS.map(([name, heads]) => {
      const node = slab(name, heads, first);
      first += heads;
      return node;
    }),
  );
}

/** One of Q, K and V: a strip for each head. */
function slab(name, heads, first) {
  const strips = Array.from({ length: heads }, (_, head) => {
    const isSelected = head === (name === "Q" ? state.head : Math.floor((state.head * G) / H));
    const from = (first + head) * config.head_width;
    return make(
      "button",
      {
        type: "button",
        class: "strip",
        "aria-pressed": String(isSelected),
        "aria-label": `${name} ${t("slabs.rows", { head: String(head), from: whole(from), to: whole(from + config.head_width - 1) })}`,
        title: `${name} ${t("slabs.rows", { head: String(head), from: whole(from), to: whole(from + config.head_width - 1) })}`,
        click: () => change({ head: name === "Q" ? head : Math.floor((head * H) / G) }),
      },
      term(String(head), "axis"),
      strip(first + head),
    );
  });
  const node = make(
    "div",
    { class: "slab" },
    make("h4", { translate: "no" }, name, make("small", {}, ` ${whole(heads * config.head_width)} × ${whole(config.width)}`)),
    ...strips,
  );
  node.style.setProperty("--strips", heads);
  return node;
}

function strip(index) {
  const canvas = make("canvas", { "aria-hidden": "true" });
  canvas.width = slabColumns;
  canvas.height = slabRows;
  const image = new ImageData(slabColumns, slabRows);
  const start = (state.layer * (H + 2 * G) + index) * slabRows * slabColumns;
  for (let i = 0; i < slabRows * slabColumns; i++) image.data.set([...ramp(slabs[start + i] / 255), 255], 4 * i);
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

function drawLayers() {
  const step = (by, text) =>
    make(
      "button",
      {
        type: "button",
        "aria-label": t(by < 0 ? "weights.down" : "weights.up"),
        disabled: state.layer + by < 0 || state.layer + by >= L,
        click: () => change({ layer: state.layer + by }),
      },
      text,
    );
  const hadFocus = find("layers").contains(document.activeElement) && document.activeElement.getAttribute("aria-label");
  find("layers").replaceChildren(step(-1, "‹"), term(`L${state.layer}`), step(1, "›"));
  if (hadFocus) find("layers").querySelector(`[aria-label="${hadFocus}"]`)?.focus();
}

// ---------------------------------------------------------------------- the table

/** blocks.3.attn.qkv.weight belongs to blocks.3, norm_f.weight to norm_f. */
const groupName = (name) =>
  name
    .split(".")
    .slice(0, name.startsWith("blocks.") ? 2 : 1)
    .join(".");

function drawWeights() {
  const groups = grouped(report.weights, (stats) => groupName(stats.name));
  const columns = [
    "weights.name",
    "weights.shape",
    "weights.count",
    "weights.share",
    "weights.histogram",
    "weights.mean",
    "weights.std",
    "weights.min",
    "weights.max",
  ];
  const header = make(
    "tr",
    {},
    ...columns.map((key, i) => make("th", { scope: "col", class: i === 2 || i === 3 || i > 4 ? "number" : "" }, t(key))),
  );
  const bodies = [...groups].map(([name, members]) => make("tbody", {}, ...groupRows(name, members)));
  find("weights-table").replaceChildren(make("table", { class: "weights" }, make("thead", {}, header), ...bodies));
  find("weights-note").textContent = t("weights.note", { spread: whole(report.spread), most: whole(report.sampled_above) });
}

function groupRows(name, members) {
  if (members.length === 1) return [tensorRow(members[0], "")];
  const isOpen = opened.has(name);
  const count = members.reduce((sum, stats) => sum + stats.count, 0);
  const toggle = () => {
    isOpen ? opened.delete(name) : opened.add(name);
    drawWeights();
    find("weights-table").querySelector(`[data-group="${name}"]`).focus();
  };
  const button = make(
    "button",
    { type: "button", class: "toggle", "aria-expanded": String(isOpen), "data-group": name, click: toggle },
    term(name, "code"),
  );
  const shape = make("td", { class: "dim" }, t("weights.members", { count: whole(members.length) }));
  const row = make(
    "tr",
    { class: "block" },
    make("th", { scope: "row" }, button),
    shape,
    ...counts(count),
    make("td", { colspan: 5 }),
  );
  return isOpen ? [row, ...members.map((stats) => tensorRow(stats, `${name}.`))] : [row];
}

const counts = (count) => [
  make("td", { class: "number", translate: "no" }, whole(count)),
  make("td", { class: "number", translate: "no" }, percent(count / report.parameters)),
];

function tensorRow(stats, prefix) {
  const name = make("th", { scope: "row", class: prefix ? "inside" : "" }, term(stats.name.slice(prefix.length), "code"));
  const shape = make("td", { translate: "no" }, stats.shape.map(whole).join(" × "));
  if (stats.tied_to)
    return make(
      "tr",
      {},
      name,
      shape,
      make("td", { colspan: 7, class: "dim" }, ...sentence("weights.tied", { name: term(stats.tied_to, "code") })),
    );
  const numbers = ["mean", "std", "min", "max"].map((key) => make("td", { class: "number", translate: "no" }, short(stats[key])));
  return make("tr", {}, name, shape, ...counts(stats.count), make("td", {}, histogram(stats)), ...numbers);
}

function histogram(stats) {
  const most = Math.max(...stats.histogram);
  const bars = stats.histogram.map((count, i) => `M${i * 3} 24v${(-24 * count) / most}h2.4V24z`).join("");
  const node = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  node.setAttribute("viewBox", `0 0 ${report.bins * 3} 24`);
  node.setAttribute("class", "histogram");
  node.setAttribute("role", "img");
  node.setAttribute(
    "aria-label",
    t("weights.histogram.label", {
      name: stats.name,
      low: short(stats.mean - report.spread * stats.std),
      high: short(stats.mean + report.spread * stats.std),
    }),
  );
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  path.setAttribute("d", bars);
  node.append(path);
  return node;
}

function startWeights() {
  watch(["layer"], drawLayers);
  watch(["layer", "head"], drawSlabs);
  watch([], drawWeights);
}
