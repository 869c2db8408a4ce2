// The top of the page, and the start of everything.

const MOST_SHOWN = 240; // characters of the prompt: its end

function drawTop() {
  document.title = t("title", { model: report.model, prompt: report.prompt.slice(0, 60) });
  find("model").textContent = report.model;
  const embedding = { vocabulary: whole(V), width: whole(config.width), product: whole(V * config.width) };
  const likeliest = report.next_tokens[0];
  const shown = [...report.prompt].length > MOST_SHOWN ? `…${[...report.prompt].slice(-MOST_SHOWN).join("")}` : report.prompt;
  find("prompt").replaceChildren(
    term(shown, "prompt-text"),
    " ",
    make(
      "span",
      { class: "ghost", title: t("top.likeliest") },
      token(likeliest.id),
      term(percent(likeliest.probability), "number"),
    ),
  );
  find("parameters").replaceChildren(
    ...sentence("top.parameters", { count: make("b", { translate: "no" }, whole(report.parameters)) }),
  );
  const other = config.tied_head ? { ...embedding, untied: whole(report.parameters_untied) } : embedding;
  find("tied").textContent =
    t(config.tied_head ? "top.tied" : "top.untied", other) +
    (report.parameters_active < report.parameters ? ` ${t("top.active", { count: whole(report.parameters_active) })}` : "");
  const facts = [
    ["top.layers", L],
    ["top.heads", G < H ? `${H} (${G} KV)` : H],
    ["top.width", config.width],
    ["top.vocabulary", V],
    ["top.context", config.context_tokens],
    ["top.tokens", T],
  ];
  find("facts").replaceChildren(
    ...facts.map(([key, x]) =>
      make("div", {}, make("dt", {}, t(key)), make("dd", { translate: "no" }, typeof x === "number" ? whole(x) : x)),
    ),
  );
}

function startTop() {
  segments("languages", "language", ["en", "vi"], (name) => [
    make("span", { lang: name, translate: "no", title: { en: "English", vi: "Tiếng Việt" }[name] }, name.toUpperCase()),
  ]);
  segments("themes", "theme", THEMES, (name) => t(`theme.${name}`));
  watch([], drawTop);
}

/** The layer with `[` and `]`, from everywhere. */
function onKey(event) {
  const step = { "[": -1, "]": 1 }[event.key];
  if (!step || event.ctrlKey || event.metaKey || event.altKey) return;
  change({ layer: Math.min(L - 1, Math.max(0, state.layer + step)) });
}

/** Another link in the same tab. One to a section is not a selection: the browser scrolls, and the address is mended. */
function onLink() {
  if (!find(location.hash.slice(1))) change(linkedState());
  writeAddress();
}

function start() {
  Object.assign(state, linkedState());
  document.body.append(
    make(
      "div",
      { id: "paints", hidden: true },
      ...["ink", "muted", "line", "accent", "second"].map((name) => make("span", { class: name })),
    ),
  );
  showTheme();
  for (const begin of [
    startTop,
    startTokens,
    startHeads,
    startAttention,
    startHead,
    startLens,
    startWhy,
    startWeights,
    startNext,
  ])
    begin();
  setLanguage(state.language);
  for (const { draw } of watchers) draw();
  document.addEventListener("keydown", onKey);
  system.addEventListener("change", () => watchers.forEach(({ draw }) => draw()));
  addEventListener("hashchange", onLink);
  new ResizeObserver(([entry]) =>
    document.documentElement.style.setProperty("--ribbon", `${entry.target.offsetHeight}px`),
  ).observe(find("tokens"));
}

start();
