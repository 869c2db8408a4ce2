// One head, large: queries down, keys across, in the three stages from scores to weights.

const STAGES = ["scores", "masked", "pattern"].filter((stage) => stages[stage]);
const LABELLED = 11; // pixels that a row needs for its token to be written beside it
let hovered = null; // [query, key] under the pointer

function layout() {
  const size = find("pattern").clientWidth;
  const isLabelled = (size * 0.78) / T >= LABELLED;
  const margin = Math.min(84, size * (isLabelled ? 0.22 : 0.15));
  return { size, margin, cell: (size - margin - 2) / T };
}

function drawPattern() {
  const canvas = find("pattern");
  const { size, margin, cell } = layout();
  if (size === 0) return;
  const scale = window.devicePixelRatio || 1;
  canvas.width = canvas.height = Math.round(size * scale);
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  context.imageSmoothingEnabled = false;
  context.drawImage(picture(state.stage, state.layer, state.head), margin, margin, cell * T, cell * T);
  drawGrid(context, margin, cell);
  drawNames(context, margin, cell);
  drawCrosshair(context, margin, cell);
  canvas.setAttribute("aria-label", patternSummary());
  drawReading();
}

function drawGrid(context, margin, cell) {
  context.strokeStyle = paint("line");
  context.lineWidth = 1;
  context.strokeRect(margin - 0.5, margin - 0.5, cell * T + 1, cell * T + 1);
  if (cell < LABELLED) return;
  context.globalAlpha = 0.5;
  context.beginPath();
  for (let i = 1; i < T; i++) {
    const place = Math.round(margin + i * cell) - 0.5;
    context.moveTo(place, margin);
    context.lineTo(place, margin + cell * T);
    context.moveTo(margin, place);
    context.lineTo(margin + cell * T, place);
  }
  context.stroke();
  context.globalAlpha = 1;
}

function drawNames(context, margin, cell) {
  const [query, key] = crosshair();
  const font = Math.max(9, Math.min(13, cell * 0.62));
  context.textBaseline = "middle";
  for (let i = 0; i < T; i++) {
    for (const [isChosen, isColumn] of [
      [i === query, false],
      [i === key, true],
    ]) {
      if (cell < LABELLED && !isChosen) continue;
      context.save();
      context.font = `${isChosen ? 700 : 400} ${cell < LABELLED ? 11 : font}px ${getComputedStyle(find("pattern")).fontFamily}`;
      context.fillStyle = paint(isChosen ? "ink" : "muted");
      const along = margin + (i + 0.5) * cell;
      context.translate(isColumn ? along : margin - 6, isColumn ? margin - 6 : along);
      if (isColumn) context.rotate(-Math.PI / 2);
      context.textAlign = isColumn ? "left" : "right";
      context.fillText(cut(context, report.tokens[i].text, margin - 10), 0, 0);
      context.restore();
    }
  }
}

/** A text cut to a width. */
function cut(context, text, width) {
  const characters = [...text];
  if (context.measureText(text).width <= width) return text;
  while (characters.length > 1 && context.measureText(`${characters.join("")}…`).width > width) characters.pop();
  return `${characters.join("")}…`;
}

function drawCrosshair(context, margin, cell) {
  const [query, key] = crosshair();
  context.strokeStyle = paint("accent");
  context.lineWidth = 1.5;
  context.globalAlpha = 0.55;
  context.strokeRect(margin, margin + query * cell, cell * T, cell);
  context.strokeRect(margin + key * cell, margin, cell, cell * T);
  context.globalAlpha = 1;
  context.lineWidth = 2.5;
  context.strokeStyle = paint("second");
  context.strokeRect(margin + key * cell, margin + query * cell, cell, cell);
}

const crosshair = () => hovered ?? [state.position, state.key];

/** Where a query looks most, itself left out where there is another. */
function strongest(query, layer, head) {
  let best = 0;
  for (let key = 1; key < query; key++)
    if (attention("pattern", layer, head, query, key) > attention("pattern", layer, head, query, best)) best = key;
  return best;
}

function patternSummary() {
  const best = strongest(state.position, state.layer, state.head);
  return t("pattern.summary", {
    head: headName(state.layer, state.head),
    stage: t(`stage.${state.stage}`),
    scores: headLabel(headScore(state.layer, state.head)),
    query: report.tokens[state.position].text,
    key: report.tokens[best].text,
    weight: percent(attention("pattern", state.layer, state.head, state.position, best)),
  });
}

function drawReading() {
  const [query, key] = crosshair();
  const at = (stage) => attention(stage, state.layer, state.head, query, key);
  const names = { query: pieceAt(query), key: pieceAt(key) };
  const steps = STAGES.flatMap((stage, i) => [
    ...(i ? [make("span", { class: "arrow", "aria-hidden": "true" }, "→")] : []),
    make(
      "span",
      { class: `step${stage === state.stage ? " on" : ""}` },
      make("small", {}, t(`stage.${stage}`)),
      make("b", { translate: "no" }, stage === "pattern" ? percent(at(stage)) : fixed(at(stage))),
    ),
  ]);
  find("reading").replaceChildren(
    make("span", { class: "pair" }, ...sentence(key > query ? "reading.future" : "reading", names)),
    make("span", { class: "steps" }, ...steps),
  );
}

function drawRamp() {
  const isWeight = state.stage === "pattern";
  const places = Array.from({ length: 17 }, (_, i) => i / 16);
  const swatch = make("span", { class: "swatch wide" });
  swatch.style.background = `linear-gradient(to right, ${places.map((x) => css(isWeight ? weightColour(x) : diverging(2 * x - 1))).join(", ")})`;
  const most = isWeight ? 1 : largestScore(state.stage, state.layer, state.head);
  const ends = [
    term(isWeight ? percent(0) : signed(-most, 1), "number"),
    swatch,
    term(isWeight ? percent(1) : signed(most, 1), "number"),
  ];
  const note = isWeight ? [t("ramp.root")] : state.stage === "masked" ? [hiddenSwatch(), t("ramp.hidden")] : [t("ramp.future")];
  find("ramp").replaceChildren(make("span", { class: "ends" }, ...ends), make("span", {}, ...note));
}

function hiddenSwatch() {
  const node = make("span", { class: "swatch small" });
  node.style.background = css(hiddenColour());
  return node;
}

function startAttention() {
  segments("stages", "stage", STAGES, (name) => t(`stage.${name}`));
  watch(["layer", "head", "stage", "position", "key"], drawPattern);
  watch(["layer", "head", "stage"], drawRamp);
  const canvas = find("pattern");
  const under = (event) => {
    const { margin, cell } = layout();
    const [key, query] = [event.offsetX, event.offsetY].map((x) => Math.min(T - 1, Math.floor((x - margin) / cell)));
    return query >= 0 && key >= 0 ? [query, key] : null;
  };
  const hover = (cell) => {
    hovered = cell;
    drawPattern();
  };
  canvas.addEventListener("pointermove", (event) => event.pointerType === "mouse" && hover(under(event)));
  canvas.addEventListener("pointerleave", () => hover(null));
  canvas.addEventListener("click", (event) => {
    const cell = under(event);
    if (cell) change({ position: cell[0], key: cell[1] });
  });
  canvas.addEventListener("keydown", (event) => {
    const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!steps) return;
    event.preventDefault();
    const kept = (x) => Math.min(T - 1, Math.max(0, x));
    change({ position: kept(state.position + steps[0]), key: kept(state.key + steps[1]) });
  });
  new ResizeObserver(drawPattern).observe(canvas);
}
