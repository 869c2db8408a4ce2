// One selection that every view follows, kept in the address so that a link reproduces it.

const THEMES = ["system", "light", "dark"];
const START = {
  language: firstLanguage(),
  theme: "system",
  position: T - 1, // of the selected token: the query
  key: 0, // the position that it is held against; where the query looks most, if nobody chose one
  ...bestHead(), // layer and head
  row: L, // of the lens
  stage: "pattern",
  sort: "layer",
  pair: 0,
  temperature: 1,
  topK: 0,
  topP: 1,
};
const ALWAYS = ["language", "layer", "head", "key"]; // written into every link; the others when they are not as at the start
const state = { ...START };
const watchers = [];

/** Call `draw` when one of these parts of the state changes, and for another language or theme. */
function watch(names, draw) {
  watchers.push({ names: [...names, "language", "theme"], draw });
}

function change(wanted) {
  const changes = { ...wanted };
  const { position, layer, head } = { ...state, ...wanted };
  if (!("key" in wanted) && ["position", "layer", "head"].some((name) => name in wanted))
    changes.key = strongest(position, layer, head);
  const changed = Object.keys(changes).filter((name) => state[name] !== changes[name]);
  if (changed.length === 0) return;
  Object.assign(state, changes);
  if (changed.includes("language")) setLanguage(state.language);
  if (changed.includes("theme")) showTheme();
  for (const { names, draw } of watchers) if (names.some((name) => changed.includes(name))) draw();
  writeAddress();
}

function showTheme() {
  document.documentElement.style.colorScheme = state.theme === "system" ? "light dark" : state.theme;
}

function writeAddress() {
  const told = Object.entries(state).filter(([name, value]) => ALWAYS.includes(name) || value !== START[name]);
  history.replaceState(null, "", `#${new URLSearchParams(told)}`);
}

/** The state that a link asks for, as far as this report has it; the rest is as at the start. */
function linkedState() {
  const limits = {
    position: T - 1,
    key: T - 1,
    layer: L - 1,
    head: H - 1,
    row: L,
    pair: 1,
    temperature: MOST_TEMPERATURE,
    topK: logits.length,
    topP: 1,
  };
  const choices = { language: Object.keys(WORDS), theme: THEMES, stage: STAGES, sort: SORTS };
  const asked = { ...START, key: null };
  for (const [name, text] of new URLSearchParams(location.hash.slice(1))) {
    const isNumber = Object.hasOwn(limits, name) && text !== "" && Number(text) >= 0 && Number(text) <= limits[name];
    if (Object.hasOwn(choices, name) && choices[name].includes(text)) asked[name] = text;
    else if (isNumber)
      asked[name] =
        name === "temperature" ? Number(text) : name === "topP" ? Math.max(0.01, Number(text)) : Math.floor(Number(text));
  }
  asked.key ??= strongest(asked.position, asked.layer, asked.head);
  return asked;
}

/** The language of the browser, the first of them that there is, else English. */
function firstLanguage() {
  return navigator.languages.map((name) => name.split("-")[0]).find((name) => name in WORDS) ?? "en";
}

// ---------------------------------------------------------------------- elements

/** make("p", { class: "note" }, "text", child): an element. Attributes that are functions listen. */
function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}

const find = (id) => document.getElementById(id);

/** A name or number of the model, which no language changes. */
const term = (text, kind = "term") => make("span", { class: kind, translate: "no" }, text);
const fragments = new Set(report.fragments);

/** A token by its id; one that is a part of a character shows its bytes. */
function token(id, kind = "token") {
  const node = term(label(id), fragments.has(id) ? `${kind} fragment` : kind);
  if (fragments.has(id)) node.title = t("token.bytes");
  return node;
}

/** A token of the prompt. */
const pieceAt = (position) => token(report.tokens[position].id);

/** A row of buttons of which one is pressed. */
function segments(id, name, choices, text) {
  watch([name], () => {
    const hadFocus = find(id).contains(document.activeElement);
    find(id).replaceChildren(
      ...choices.map((value) =>
        make(
          "button",
          {
            type: "button",
            "aria-pressed": String(state[name] === value),
            "data-value": value,
            click: () => change({ [name]: value }),
          },
          ...[text(value)].flat(),
        ),
      ),
    );
    if (hadFocus) find(id).querySelector("[aria-pressed=true]").focus();
  });
}

/** A bar from 0 to `share` of its width. */
function bar(share, kind = "") {
  const node = make("span", { class: `bar ${kind}`, "aria-hidden": "true" }, make("i"));
  node.firstChild.style.width = `${100 * Math.min(1, Math.max(0, share))}%`;
  return node;
}

/** Tokens with their probabilities, the real one marked. */
function candidates(top, real) {
  const rows = top.map(({ id, probability }) =>
    make("li", { class: id === real ? "real" : "" }, token(id), bar(probability), term(percent(probability), "number")),
  );
  return make("ol", { class: "candidates" }, ...rows);
}

/** Items by what `key` says of them, in a Map. */
function grouped(items, key) {
  const groups = new Map();
  for (const item of items) groups.set(key(item), [...(groups.get(key(item)) ?? []), item]);
  return groups;
}

/** Which key goes where in a list or grid: the new index, or null. */
function moved(event, index, columns, count) {
  const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns };
  if (event.key === "Home") return 0;
  if (event.key === "End") return count - 1;
  if (!(event.key in steps)) return null;
  const next = index + steps[event.key];
  return next >= 0 && next < count ? next : index;
}
