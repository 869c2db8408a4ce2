// Colours that mean numbers: one hue for what grows from 0, blue against orange for what has a sign.

const RAMPS = {
  light: {
    blue: ["#ffffff", "#dce9fb", "#9cc3f3", "#4687dc", "#123f8a"],
    orange: ["#ffffff", "#fdeedd", "#f9cd9f", "#ec9a4c", "#b65a0a"],
  },
  dark: {
    blue: ["#161b23", "#1b3150", "#255796", "#4f96ee", "#c4deff"],
    orange: ["#161b23", "#3a2816", "#71451c", "#c07a2e", "#ffc587"],
  },
};

const HIDDEN = { light: "#d6dae2", dark: "#3a4350" }; // what the mask takes away
const system = matchMedia("(prefers-color-scheme: dark)");
const colourScheme = () => (state.theme === "system" ? (system.matches ? "dark" : "light") : state.theme);

const parsed = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
const css = (rgb) => `rgb(${rgb.map(Math.round).join(" ")})`;

/** The colour of x in 0 … 1 as [red, green, blue]. */
function ramp(x, hue = "blue") {
  const stops = RAMPS[colourScheme()][hue];
  const place = Math.min(1, Math.max(0, x)) * (stops.length - 1);
  const i = Math.min(stops.length - 2, Math.floor(place));
  const [low, high] = [parsed(stops[i]), parsed(stops[i + 1])];
  return low.map((c, k) => c + (high[k] - c) * (place - i));
}

/** The colour of x in -1 … 1: orange below 0, blue above. */
const diverging = (x) => (x < 0 ? ramp(-x, "orange") : ramp(x, "blue"));

const hiddenColour = () => parsed(HIDDEN[colourScheme()]);

/** Weights of attention are mostly small: their colour goes with the root, so that small ones show. */
const weightColour = (p) => ramp(Math.sqrt(p));

/** Relative luminance (WCAG 2.2). */
function luminance(rgb) {
  const [r, g, b] = rgb.map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

/** Black or white, whichever reads better on a colour: at least 4.5 to 1. */
const ink = (rgb) => (luminance(rgb) > 0.179 ? "#000" : "#fff");

/** A colour of the style sheet, for canvases. */
const paint = (name) => getComputedStyle(document.querySelector(`#paints .${name}`)).color;
