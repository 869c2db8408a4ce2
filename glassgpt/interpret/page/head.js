// One head in numbers: its scores beside their controls, and the selected query as a table.

function drawBadges() {
  const score = headScore(state.layer, state.head);
  find("head-title").textContent = headName(state.layer, state.head);
  find("badges-note").textContent = t(isScored ? "attention.control" : "attention.unscored");
  if (!isScored) return;
  const measured = MEASURES.map((name) => badge(name, score[name], score[`${name}_control`]));
  const plain = [
    tile("sort.entropy_bits", fixed(score.entropy_bits), t("bits")),
    tile("badge.distance", fixed(score.distance_tokens, 1), t("badge.tokens")),
  ];
  find("badges").replaceChildren(...measured, ...plain);
}

/** A score beside the same measure where there is nothing to be found. */
function badge(name, score, control) {
  const meter = (value, kind) =>
    make(
      "span",
      { class: `meter ${kind}` },
      make("small", {}, t(`badge.${kind}`)),
      bar(value, kind),
      make("b", { translate: "no" }, fixed(value)),
    );
  return make(
    "div",
    { class: "badge", "data-measure": name, title: t(`badge.${name}`) },
    make("span", {}, t(`sort.${name}`)),
    meter(score, "score"),
    meter(control, "control"),
  );
}

/** The selected query's row as a table: what the picture says, for those who cannot see it. */
function drawTable() {
  const button = find("table-button");
  const isOpen = button.getAttribute("aria-expanded") === "true";
  button.textContent = t(isOpen ? "table.hide" : "table.show");
  find("table").hidden = !isOpen;
  if (!isOpen) return;
  const at = (stage, key) => attention(stage, state.layer, state.head, state.position, key);
  const numbers = (key) =>
    STAGES.map((stage) =>
      make("td", { class: "number", translate: "no" }, stage === "pattern" ? percent(at(stage, key)) : fixed(at(stage, key))),
    );
  const rows = report.tokens.map((_, key) =>
    make(
      "tr",
      {},
      make("td", { class: "number", translate: "no" }, whole(key)),
      make("th", { scope: "row" }, pieceAt(key)),
      ...numbers(key),
    ),
  );
  const caption = make(
    "caption",
    {},
    ...sentence("table.caption", {
      head: term(headName(state.layer, state.head)),
      query: pieceAt(state.position),
      position: whole(state.position),
    }),
  );
  const header = make(
    "tr",
    {},
    ...["table.position", "table.key", ...STAGES.map((stage) => `stage.${stage}`)].map((key) =>
      make("th", { scope: "col" }, t(key)),
    ),
  );
  find("table").replaceChildren(make("table", {}, caption, make("thead", {}, header), make("tbody", {}, ...rows)));
}

function startHead() {
  watch(["layer", "head"], drawBadges);
  watch(["layer", "head", "position"], drawTable);
  find("table-button").addEventListener("click", (event) => {
    event.target.setAttribute("aria-expanded", String(event.target.getAttribute("aria-expanded") !== "true"));
    drawTable();
  });
}
