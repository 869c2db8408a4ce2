// The next token: the whole vocabulary's probabilities, worked out again at every move of a slider.

const order = descending(logits);
const MOST_TEMPERATURE = 5;
const SLIDER_STEPS = 100; // of top-k, whose slider goes by powers

const kOf = (place) => (place >= SLIDER_STEPS ? 0 : Math.round(logits.length ** (place / SLIDER_STEPS)));
const placeOf = (k) =>
  k === 0 || k >= logits.length ? SLIDER_STEPS : Math.round((SLIDER_STEPS * Math.log(k)) / Math.log(logits.length));

const SLIDERS = [
  {
    name: "temperature",
    max: MOST_TEMPERATURE,
    step: 0.05,
    read: Number,
    write: (x) => x,
    text: () => (state.temperature === 0 ? t("next.greedy") : fixed(state.temperature)),
  },
  {
    name: "topK",
    max: SLIDER_STEPS,
    step: 1,
    read: (x) => kOf(Number(x)),
    write: placeOf,
    text: () => (state.topK === 0 ? t("next.all", { count: whole(logits.length) }) : whole(state.topK)),
  },
  {
    name: "topP",
    max: 1,
    min: 0.01,
    step: 0.01,
    read: Number,
    write: (x) => x,
    text: () => (state.topP === 1 ? t("next.off") : fixed(state.topP)),
  },
];

function startSliders() {
  find("sliders").append(
    ...SLIDERS.map(({ name, max, min = 0, step, read }) =>
      make(
        "label",
        {},
        make("span", { "data-i18n": `next.${name}` }),
        make("output", { id: `${name}-text`, translate: "no" }),
        make("input", {
          type: "range",
          id: name,
          min,
          max,
          step,
          input: (event) => change({ [name]: read(event.target.value) }),
        }),
      ),
    ),
  );
}

function drawSliders() {
  for (const { name, max, min = 0, write, text } of SLIDERS) {
    const input = find(name);
    if (input !== document.activeElement || Number(input.value) !== write(state[name])) input.value = write(state[name]);
    input.style.setProperty("--filled", `${(100 * (input.value - min)) / (max - min)}%`);
    input.setAttribute("aria-valuetext", `${t(`next.${name}`)} ${text()}`);
    find(`${name}-text`).textContent = text();
  }
}

function drawNext() {
  const p = distribution(logits, state, order);
  const shown = report.likeliest;
  const rest = order.subarray(shown.length).reduce((sum, id) => sum + p[id], 0); // not 1 less the shown: that leaves roundings
  const kept = p.reduce((count, x) => count + (x > 0), 0);
  const most = Math.max(rest, ...shown.map((id) => p[id]));
  const keptRest = kept - shown.filter((id) => p[id] > 0).length;
  drawNextRows(
    shown.map((id) => [id, p[id]]),
    most,
    rest,
    keptRest,
  );
  const bits = entropyBits(p);
  find("next-facts").replaceChildren(
    tile("next.entropy", fixed(bits), t("bits")),
    tile("next.perplexity", fixed(2 ** bits, 2 ** bits < 100 ? 2 : 0), t("next.choices")),
    tile("next.kept", whole(kept), t("lens.of", { count: whole(logits.length) })),
  );
}

/** Rows keep their elements, so that bars glide. */
function drawNextRows(rows, most, rest, keptRest) {
  const body = find("next-table").tBodies[0];
  rows.forEach(([id, p], i) => {
    const cells = body.rows[i].cells;
    const numbers = [fixed(logits[id]), fixed(logits[id] / (state.temperature || 1)), p > 0 ? "✓" : "×", percent(p)];
    body.rows[i].classList.toggle("cut", p === 0);
    cells[3].setAttribute("aria-label", t(p > 0 ? "next.yes" : "next.no"));
    [cells[1], cells[2], cells[3], cells[4].lastChild].forEach((node, k) => (node.textContent = numbers[k]));
    cells[4].querySelector("i").style.width = `${(100 * p) / most}%`;
  });
  const last = find("next-table").tFoot.rows[0];
  last.classList.toggle("cut", keptRest === 0);
  last.cells[0].textContent = t("next.rest", { count: whole(logits.length - rows.length) });
  last.cells[1].textContent = keptRest > 0 ? "✓" : "×";
  last.cells[1].setAttribute("aria-label", t(keptRest > 0 ? "next.yes" : "next.no"));
  last.cells[2].lastChild.textContent = percent(rest);
  last.cells[2].querySelector("i").style.width = `${(100 * rest) / most}%`;
  find("next-table").tFoot.rows[1].cells[1].textContent = percent(
    Math.round((rest + rows.reduce((sum, [, p]) => sum + p, 0)) * 1e9) / 1e9,
  );
}

function startRows() {
  const probability = (kind) => make("td", { class: "probability", translate: "no" }, bar(0, kind), term("", "number"));
  const row = (id) =>
    make(
      "tr",
      {},
      make("th", { scope: "row" }, token(id)),
      ...["number", "number scaled", "mark"].map((kind) => make("td", { class: kind, translate: "no" })),
      probability("glide"),
    );
  const columns = ["next.token", "next.logit", "next.scaled", "next.kept.short", "next.probability"];
  find("next-table").append(
    make("thead", {}, make("tr", {}, ...columns.map((key) => make("th", { scope: "col", "data-i18n": key })))),
    make("tbody", {}, ...report.likeliest.map(row)),
    make(
      "tfoot",
      {},
      make(
        "tr",
        { class: "rest" },
        make("th", { scope: "row", colspan: 3 }),
        make("td", { class: "mark", translate: "no" }),
        probability("glide rest"),
      ),
      make(
        "tr",
        { class: "total" },
        make("th", { scope: "row", colspan: 4, "data-i18n": "next.sum" }),
        make("td", { class: "number", translate: "no" }),
      ),
    ),
  );
}

function startNext() {
  startSliders();
  startRows();
  watch(["temperature", "topK", "topP"], drawSliders);
  watch(["temperature", "topK", "topP"], drawNext);
  watch([], () => find("next-note").replaceChildren(...sentence("next.note", { token: pieceAt(T - 1) })));
  find("next-reset").addEventListener("click", () => change({ temperature: 1, topK: 0, topP: 1 }));
}
