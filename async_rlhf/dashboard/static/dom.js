// Elements made from texts alone: whatever a model or a folder says stays text.

const SVG = "http://www.w3.org/2000/svg";

/** An HTML element. `props`: class, title, href and other attributes, or `on` with listeners; children: nodes or texts. */
export function el(tag, props = {}, ...children) {
  return fill(document.createElement(tag), props, children);
}

/** The same for SVG. */
export function svg(tag, props = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), props, children);
}

/** A text that somebody else wrote: isolated, so that it cannot reorder what stands around it. */
export function said(text, more = "") {
  return el("bdi", { class: `said ${more}` }, text);
}

/** The children of a node, all at once. */
export function put(node, ...children) {
  node.replaceChildren(...children.flat().filter((child) => child !== null && child !== undefined));
}

/** A table row: a heading and cells, each a node or a text. */
export function row(label, ...cells) {
  return el("tr", {}, el("th", { scope: "row" }, label), ...cells.map((cell) => el("td", {}, cell)));
}

/** A table in a box that scrolls by itself when it is too wide. */
export function table(heads, rows, kind = "") {
  const head = heads.length ? el("thead", {}, el("tr", {}, ...heads.map((text) => el("th", { scope: "col" }, text)))) : null;
  return el("div", { class: "scroll" }, el("table", { class: kind || (heads.length ? "" : "bare") }, head, el("tbody", {}, ...rows)));
}

function fill(node, props, children) {
  for (const [name, value] of Object.entries(props)) {
    if (name === "on") for (const [event, heard] of Object.entries(value)) node.addEventListener(event, heard);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, String(value));
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}
