// Words and numbers in the reader's language.

const WORDS = JSON.parse(document.getElementById("words").textContent);
let language = "en";

/** The text of a key, its {names} filled in. */
function t(key, values = {}) {
  const text = WORDS[language][key];
  if (text === undefined) throw new Error(`no word for ${key} in ${language}`);
  return text.replace(/\{(\w+)\}/g, (_, name) => values[name]);
}

/** A text around elements: "after {token}" with an element for {token} becomes a list of both. */
function sentence(key, values) {
  return WORDS[language][key].split(/(\{\w+\})/).map((part) => (part.startsWith("{") ? values[part.slice(1, -1)] : part));
}

function setLanguage(name) {
  language = name;
  document.documentElement.lang = t("locale");
  for (const node of document.querySelectorAll("[data-i18n]")) node.textContent = t(node.dataset.i18n);
  for (const node of document.querySelectorAll("[data-i18n-label]")) node.setAttribute("aria-label", t(node.dataset.i18nLabel));
}

const formats = new Map();

function formatted(x, options) {
  const key = language + JSON.stringify(options);
  if (!formats.has(key)) formats.set(key, new Intl.NumberFormat(t("locale"), { signDisplay: "negative", ...options })); // no −0
  return formats.get(key).format(x).replaceAll("-", "−");
}

/** 1.2 × 10⁻⁴. */
function scientific(x) {
  const [mantissa, exponent] = x.toExponential(1).split("e").map(Number); // rounded, so never 10
  const raised = String(exponent).replace(/./g, (c) => (c === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[c]));
  return `${formatted(mantissa, { maximumFractionDigits: 1 })} × 10${raised}`;
}

const whole = (x) => formatted(x, { maximumFractionDigits: 0 });
const fixed = (x, digits = 2) =>
  x === -Infinity ? "−∞" : formatted(x, { minimumFractionDigits: digits, maximumFractionDigits: digits });
const signed = (x, digits = 2) =>
  formatted(x, { minimumFractionDigits: digits, maximumFractionDigits: digits, signDisplay: "exceptZero" });
const short = (x) => (Math.abs(x) >= 1e-3 || x === 0 ? formatted(x, { maximumSignificantDigits: 2 }) : scientific(x));

/** A probability with the digits that it has: 34.1%, 0.012%, 2 × 10⁻⁹, never "less than". */
function percent(p) {
  if (p === 0 || p === 1) return formatted(p, { style: "percent" });
  if (p < 1e-6) return scientific(p);
  return formatted(
    p,
    p < 0.01
      ? { style: "percent", maximumSignificantDigits: 2 }
      : { style: "percent", minimumFractionDigits: 1, maximumFractionDigits: 1 },
  );
}
