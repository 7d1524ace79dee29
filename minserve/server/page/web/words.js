// Numbers as people read them, and elements of the page. No text ever becomes markup.

const SVG = "http://www.w3.org/2000/svg";

/** Milliseconds in words: "38 ms", "1.2 s"; a dash for none. */
export function duration(ms) {
  if (ms === null || ms === undefined) return "–";
  if (Math.abs(ms) >= 9995) return `${(ms / 1000).toFixed(0)} s`;
  if (Math.abs(ms) >= 999.5) return `${(ms / 1000).toFixed(1)} s`;
  return `${ms.toFixed(Math.abs(ms) < 9.95 ? 1 : 0)} ms`;
}

/** A share of 0 to 1 in words. It says 100 % of nothing less than all. */
export function percent(part, whole) {
  if (!whole) return "–";
  const share = (100 * part) / whole;
  return `${part < whole ? Math.min(99, Math.round(share)) : 100} %`;
}

export const count = (number) => number.toLocaleString("en").replaceAll(",", "\u202f");

/** How a token stood to its deadline. */
export function slackWords(ms) {
  return ms >= 0 ? `${duration(ms)} early` : `${duration(-ms)} late`;
}

/** How long a request waited or took, by where it stands. */
export const plural = (number, one, many = `${one}s`) => `${count(number)} ${number === 1 ? one : many}`;

/** An element; attributes by name, children as elements or text. */
export function el(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

/** The same of SVG. */
export function svg(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** Set an element's text where it differs, so that nothing is drawn or read out anew. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** A legend's entries: a class, a text, and a path where a square is not what is drawn. */
export function legend(list, entries) {
  list.replaceChildren(
    ...entries.map(([kind, text, shape]) =>
      !kind ? el("li", { class: "name" }, text) : el("li", {}, svg("svg", { viewBox: "0 0 12 12", "aria-hidden": "true" },
        typeof shape === "string" ? svg("path", { class: kind, d: shape }) : svg("rect", { class: kind, width: 12, height: 12, rx: 2 })), text),
    ),
  );
}
