// The prompt as a ribbon of tokens, and what the model expected at the selected one.

const mostSurprising = Math.max(8, ...report.tokens.map((token) => token.surprisal_bits ?? 0));

function chip(piece, position) {
  const surprisal = piece.surprisal_bits;
  const isSelected = position === state.position;
  const colour = ramp(surprisal === undefined ? 0 : (0.7 * surprisal) / mostSurprising, "orange");
  const weight = position <= state.position ? attention("pattern", state.layer, state.head, state.position, position) : 0;
  const node = make(
    "div",
    {
      role: "option",
      class: `chip${piece.text === piece.character ? "" : " fragment"}`,
      tabindex: isSelected ? 0 : -1,
      "aria-selected": String(isSelected),
      "aria-label": chipLabel(piece, position),
      "data-position": position,
      click: () => change({ position }),
    },
    term(piece.text, "text"),
    term(String(piece.id), "id"),
    make("i", { class: "look", "aria-hidden": "true" }),
  );
  node.style.background = css(colour);
  node.style.color = ink(colour);
  node.lastChild.style.transform = `scaleX(${weight})`;
  return node;
}

function chipLabel(piece, position) {
  const values = {
    position: whole(position),
    text: piece.text,
    id: piece.id,
    bits: fixed(piece.surprisal_bits ?? 0, 1),
    character: piece.character,
  };
  const base = t(piece.surprisal_bits === undefined ? "chip.first" : "chip", values);
  return piece.text === piece.character || !piece.character ? base : `${base}, ${t("chip.part", values)}`;
}

/** Chips, those that share a character under it. */
function drawChips() {
  const groups = grouped([...report.tokens.keys()], (i) => report.tokens[i].group);
  const nodes = [...groups.values()].map((positions) => {
    const chips = positions.map((i) => chip(report.tokens[i], i));
    if (chips.length === 1) return chips[0];
    const character = report.tokens[positions[0]].character;
    return make(
      "div",
      { role: "group", class: "group", "aria-label": character },
      term(character, "joined"),
      make("div", {}, ...chips),
    );
  });
  const box = find("chips");
  const hadFocus = box.contains(document.activeElement);
  box.replaceChildren(...nodes);
  const selected = box.querySelector("[aria-selected=true]");
  if (hadFocus) selected.focus({ preventScroll: true });
  const [a, b] = [selected.getBoundingClientRect(), box.getBoundingClientRect()];
  box.scrollLeft += a.left < b.left || a.right > b.right ? a.left - b.left - (b.width - a.width) / 2 : 0;
  box.scrollTop += a.top < b.top || a.bottom > b.bottom ? a.top - b.top - (b.height - a.height) / 2 : 0;
}

function drawTokensLegend() {
  const swatch = make("span", { class: "swatch" });
  swatch.style.background = `linear-gradient(to right, ${[0, 0.25, 0.5, 0.7].map((x) => css(ramp(x, "orange"))).join(", ")})`;
  find("tokens-legend").replaceChildren(
    make("span", {}, swatch, t("tokens.surprisal", { most: fixed(mostSurprising, 0) })),
    make(
      "span",
      {},
      make("span", { class: "swatch look" }),
      ...sentence("tokens.look", { head: term(headName(state.layer, state.head)) }),
    ),
  );
}

function drawExpected() {
  const piece = report.tokens[state.position];
  find("expected-title").replaceChildren(
    ...sentence("expected.title", { position: whole(state.position), token: pieceAt(state.position) }),
  );
  if (piece.surprisal_bits === undefined) {
    find("expected").replaceChildren(make("p", { class: "note" }, t(report.begins ? "expected.begin" : "expected.first")));
    return;
  }
  const { top } = lensCell(L, state.position - 1);
  const verdict = { token: pieceAt(state.position), rank: term(whole(piece.rank), "number"), count: whole(V) };
  const joined =
    piece.text === piece.character || !piece.character
      ? []
      : [
          make(
            "p",
            { class: "note" },
            ...sentence("expected.part", { bytes: term(piece.hex), character: term(piece.character, "token") }),
          ),
        ];
  find("expected").replaceChildren(
    candidates(top, piece.id),
    make(
      "div",
      { class: "verdict" },
      make("p", {}, ...sentence("expected.rank", verdict)),
      make(
        "div",
        { class: "tiles" },
        tile("surprisal", fixed(piece.surprisal_bits), t("bits")),
        tile("expected.entropy", fixed(piece.entropy_bits), t("bits")),
        tile("expected.probability", percent(2 ** -piece.surprisal_bits), ""),
      ),
      ...joined,
    ),
  );
}

/** One number with its name. */
function tile(key, number, unit) {
  return make(
    "p",
    { class: "tile" },
    make("span", {}, t(key)),
    make("b", { translate: "no" }, number),
    " ",
    make("small", {}, unit),
  );
}

function startTokens() {
  watch(["position", "layer", "head"], drawChips);
  watch(["layer", "head"], drawTokensLegend);
  watch(["position"], drawExpected);
  find("chips").addEventListener("keydown", (event) => {
    const position = moved(event, state.position, 1, T);
    if (position === null) return;
    event.preventDefault();
    change({ position });
  });
}
