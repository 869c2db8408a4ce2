// Direct logit attribution: a logit as the sum of what every part of the network wrote into it.

const PAIRS = [0, 1];
const MOST_BARS = 14;
const MODELS = config.logit_cap === null ? ["why.logit", "why.lead"] : ["why.logit.uncapped", "why.lead.uncapped"]; // by pair
const sumOf = (parts) => parts.reduce((sum, part) => sum + part.value, 0);
const partColour = (value, most) => diverging(Math.sign(value) * Math.sqrt(Math.abs(value) / most));

/** How a part is called: heads and layers by number, the others by a word. */
function partName({ kind, layer, index, name }) {
  if (kind === "head") return term(headName(layer, index));
  if (kind === "token" || kind === "position" || kind === "embedding" || kind === "norm_bias")
    return make("span", {}, t(`part.${kind}`));
  if (kind === "mlp") return term(`L${layer} MLP`);
  if (kind === "attn_bias" || kind === "mlp_bias")
    return make("span", {}, term(`L${layer} ${kind === "attn_bias" ? "attn" : "MLP"}`), " ", t("part.bias"));
  if (kind === "expert" || kind === "shared_expert")
    return make("span", {}, term(`L${layer}`), " ", t(`part.${kind}`, { index: whole(index) }));
  return term(name);
}

function drawWhy() {
  const attribution = report.attributions[state.pair];
  const tokens = { target: token(report.target), against: token(report.against) };
  find("why-note").replaceChildren(...sentence(state.pair ? "why.note.against" : "why.note", tokens));
  drawSum(attribution);
  drawMatrix(attribution.parts);
  drawParts(attribution.parts);
}

function drawSum({ parts, total, logit }) {
  const written = make("b", { translate: "no", id: "why-total" }, signed(total, 4));
  const real = make("b", { translate: "no", id: "why-logit" }, signed(logit, 4));
  const difference = make("small", {}, ...sentence("why.difference", { difference: term(short(Math.abs(total - logit))) }));
  find("why-sum").replaceChildren(
    make("span", {}, make("small", {}, t("why.total", { count: whole(parts.length) })), written),
    make("span", { class: "equals", "aria-hidden": "true" }, Math.abs(total - logit) < 0.005 ? "=" : "≈"),
    make("span", {}, make("small", {}, t(MODELS[state.pair])), real),
    difference,
  );
}

/** Layers bottom to top, heads from left to right, then what is not attention. */
function drawMatrix(parts) {
  const of = (layer, ...kinds) => parts.filter((part) => part.layer === layer && kinds.includes(part.kind));
  const row = (layer) => [
    ...of(layer, "head").map((part) => [headName(layer, part.index), part.value, () => change({ layer, head: part.index })]),
    [`L${layer} MLP`, sumOf(of(layer, "mlp", "expert", "shared_expert")), null],
    [`L${layer} ${t("part.bias")}`, sumOf(of(layer, "attn_bias", "mlp_bias")), null],
  ];
  const rows = Array.from({ length: L }, (_, l) => row(l)).reverse();
  const most = Math.max(1e-9, ...rows.flat().map(([, value]) => Math.abs(value)));
  const header = ["", ...Array.from({ length: H }, (_, h) => term(`H${h}`)), term("MLP"), t("part.bias")];
  const body = rows.map((cells, i) =>
    make("tr", {}, make("th", { scope: "row" }, term(`L${L - 1 - i}`)), ...cells.map((cell) => matrixCell(...cell, most))),
  );
  const table = make(
    "table",
    { class: `matrix${H > 14 ? " dense" : ""}` },
    make("thead", {}, make("tr", {}, ...header.map((text) => make("th", { scope: "col" }, text)))),
    make("tbody", {}, ...body),
  );
  find("why-matrix").replaceChildren(table);
  const rest = parts.filter((part) => part.layer === null);
  find("why-rest").replaceChildren(
    ...rest.map((part) => make("span", {}, partName(part), " ", make("b", { translate: "no" }, signed(part.value, 3)))),
  );
}

function matrixCell(name, value, choose, most) {
  const node = make(
    "td",
    { translate: "no", title: `${name}: ${signed(value, 3)}`, class: choose ? "click" : "" },
    make("span", {}, signed(value, Math.abs(value) < 9.95 ? 1 : 0)),
  );
  const colour = partColour(value, most);
  node.style.background = css(colour);
  node.style.color = ink(colour);
  if (choose) node.addEventListener("click", choose);
  return node;
}

/** The largest parts as bars to the left and right of 0; the others in one. */
function drawParts(parts) {
  const sorted = [...parts].sort((a, b) => Math.abs(b.value) - Math.abs(a.value));
  const shown = sorted.slice(0, MOST_BARS).sort((a, b) => b.value - a.value);
  const others = sorted.slice(MOST_BARS);
  const rows = shown.map((part) => [partName(part), part.value]);
  if (others.length) rows.push([make("em", {}, t("why.others", { count: whole(others.length) })), sumOf(others)]);
  const most = Math.max(1e-9, ...rows.map(([, value]) => Math.abs(value)));
  const items = rows.map(([name, value]) => {
    const line = make("i", { class: value < 0 ? "minus" : "plus" });
    line.style.width = `${(50 * Math.abs(value)) / most}%`;
    return make(
      "li",
      {},
      name,
      make("span", { class: "axis-bar", "aria-hidden": "true" }, line),
      term(signed(value, 3), "number"),
    );
  });
  find("why-bars").replaceChildren(make("ol", { class: "parts" }, ...items));
}

function startWhy() {
  segments("pairs", "pair", PAIRS, (pair) =>
    pair ? sentence("why.pair", { target: token(report.target), against: token(report.against) }) : token(report.target),
  );
  watch(["pair"], drawWhy);
}
