// The logit lens: what each layer would say next, were it the last.

const rowName = (row) => (row === 0 ? "embed" : `L${row - 1}`);
const following = (position) => report.tokens[position + 1]?.id;

function drawLens() {
  const header = make(
    "tr",
    {},
    make("td", { class: "corner" }),
    ...report.tokens.map((_, i) =>
      make("th", { scope: "col", class: i === state.position ? "here" : "", click: () => change({ position: i }) }, pieceAt(i)),
    ),
  );
  const rows = Array.from({ length: L + 1 }, (_, i) => L - i).map((row) =>
    make(
      "tr",
      { role: "row" },
      make("th", { scope: "row" }, term(rowName(row))),
      ...report.tokens.map((_, position) => lensBox(row, position)),
    ),
  );
  const box = find("lens-scroll");
  const left = box.scrollLeft;
  const hadFocus = box.contains(document.activeElement);
  box.replaceChildren(
    make(
      "table",
      { role: "grid", class: "lens", "aria-label": t("lens.label"), keydown: moveInLens },
      make("thead", {}, header),
      make("tbody", {}, ...rows),
    ),
  );
  box.scrollLeft = left;
  showSelected(box, hadFocus);
}

/** One cell, coloured by the probability of its likeliest token. */
function lensBox(row, position) {
  const { top } = lensCell(row, position);
  const isSelected = row === state.row && position === state.position;
  const colour = ramp(top[0].probability);
  const node = make(
    "td",
    {
      role: "gridcell",
      class: top[0].id === following(position) ? "right" : "",
      tabindex: isSelected ? 0 : -1,
      "aria-selected": String(isSelected),
      "aria-label": t("lens.cell", {
        layer: rowName(row),
        position: whole(position),
        token: label(top[0].id),
        probability: percent(top[0].probability),
      }),
      "data-cell": `${row}.${position}`,
      click: () => change({ row, position }),
    },
    token(top[0].id, "text"),
  );
  node.style.background = css(colour);
  node.style.color = ink(colour);
  return node;
}

/** Another cell: only marks change. */
function markLens() {
  const box = find("lens-scroll");
  const hadFocus = box.contains(document.activeElement);
  for (const node of box.querySelectorAll("[aria-selected=true]")) {
    node.setAttribute("aria-selected", "false");
    node.tabIndex = -1;
  }
  const node = box.querySelector(`[data-cell="${state.row}.${state.position}"]`);
  node.setAttribute("aria-selected", "true");
  node.tabIndex = 0;
  box.querySelectorAll("thead th").forEach((th, i) => th.classList.toggle("here", i === state.position));
  showSelected(box, hadFocus);
}

/** Scroll sideways until the selected cell is seen. */
function showSelected(box, hadFocus) {
  const node = box.querySelector("[aria-selected=true]");
  if (hadFocus) node.focus({ preventScroll: true });
  const [a, b] = [node.getBoundingClientRect(), box.getBoundingClientRect()];
  if (a.right > b.right) box.scrollLeft += a.right - b.right + 8;
  if (a.left < b.left + 60) box.scrollLeft -= b.left + 60 - a.left;
}

function moveInLens(event) {
  const step = { ArrowUp: [1, 0], ArrowDown: [-1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
  if (!step) return;
  event.preventDefault();
  change({
    row: Math.min(L, Math.max(0, state.row + step[0])),
    position: Math.min(T - 1, Math.max(0, state.position + step[1])),
  });
}

function drawLensDetail() {
  const { top, rank, kl, entropy } = lensCell(state.row, state.position);
  const real = following(state.position);
  const place = { layer: term(rowName(state.row)), position: whole(state.position), token: pieceAt(state.position) };
  const facts = [tile("expected.entropy", fixed(entropy), t("bits")), tile("lens.kl", fixed(kl), t("bits"))];
  if (real !== undefined) facts.unshift(tile("lens.rank", whole(rank), t("lens.of", { count: whole(V) })));
  const ends = real === undefined ? [t("lens.end")] : sentence("lens.follows", { token: pieceAt(state.position + 1) });
  find("lens-detail").replaceChildren(
    make("h3", {}, ...sentence(state.row === 0 ? "lens.detail.embed" : "lens.detail", place)),
    make(
      "div",
      { class: "split" },
      candidates(top, real),
      make("div", {}, make("p", {}, ...ends), make("div", { class: "tiles" }, ...facts), ranks()),
    ),
  );
}

/** The real token's rank through the layers at the selected position, as a line from the first place down. */
function ranks() {
  if (following(state.position) === undefined) return "";
  const list = Array.from({ length: L + 1 }, (_, row) => lensCell(row, state.position).rank);
  const cells = list.map((rank, row) =>
    make(
      "li",
      { class: row === state.row ? "on" : "" },
      make("small", { translate: "no" }, rowName(row)),
      bar(1 - Math.log(rank) / Math.log(V)),
      make("b", { translate: "no" }, whole(rank)),
    ),
  );
  return make("div", {}, make("p", { class: "note" }, t("lens.ranks")), make("ol", { class: "ranks" }, ...cells.reverse()));
}

function startLens() {
  watch([], drawLens);
  watch(["row", "position"], markLens);
  watch(["row", "position"], drawLensDetail);
  watch([], () => {
    const swatch = make("span", { class: "swatch wide" });
    swatch.style.background = `linear-gradient(to right, ${[0, 0.25, 0.5, 0.75, 1].map((x) => css(ramp(x))).join(", ")})`;
    find("lens-legend").replaceChildren(
      make("span", { class: "ends" }, term(percent(0), "number"), swatch, term(percent(1), "number")),
      make("span", {}, make("i", { class: "dot" }), t("lens.right")),
    );
  });
}
