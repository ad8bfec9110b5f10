"use strict";
// Data, state and the few ways in which everything on the page is made. Text only ever enters as text.
const data = JSON.parse(document.getElementById("data").textContent);
const SYMBOLS = ["circle", "square", "triangle", "diamond", "star"];
const SHAPES = [d3.symbolCircle, d3.symbolSquare, d3.symbolTriangle, d3.symbolDiamond, d3.symbolStar];

// A head keeps its colour and its symbol in every chart. They are dealt by AP, the baseline first: the heads that are
// looked at most differ in colour, and 40 heads differ in one of the two.
const dealt = d3.sort(d3.range(data.heads.length), (i) => i !== data.baseline, (i) => -data.heads[i].metrics.AP);
const heads = data.heads.map((head, index) => {
  const k = dealt.indexOf(index);
  return { ...head, index, colour: `var(--head-${k % 8})`, symbol: SYMBOLS[k % 5], shape: SHAPES[k % 5] };
});
const bins = data.groups.filter((group) => group.bin !== null);
const rareKey = data.groups.some((g) => g.key === "APr") ? "APr" : data.groups[0]?.key;
const frequentKey = data.groups.some((g) => g.key === "APf") ? "APf" : bins.at(-1)?.key;
const state = {
  baseline: data.baseline,
  focus: data.best,
  // Of very many heads the best and the baseline are shown at first: dealt holds the baseline before the others.
  heads: new Set(heads.length > 12 ? dealt.slice(0, 10) : dealt),
  groups: new Set(data.groups.map((group) => group.key)),
};

const byAP = (a, b) => b.metrics.AP - a.metrics.AP;
const shownHeads = () => heads.filter((head) => state.heads.has(head.index)).sort(byAP);
const shownGroups = () => data.groups.filter((group) => state.groups.has(group.key));
const shownBins = () => shownGroups().filter((group) => group.bin !== null);
const baseline = () => heads[state.baseline];
const focus = () => heads[state.focus];
const isAlone = () => state.baseline === state.focus;
const groupOf = (key) => data.groups.find((group) => group.key === key);

const percent = (value, digits = 1) => (value == null ? "–" : (100 * value).toFixed(digits));
// A minus sign as wide as the plus, and no "-0.0".
const signed = (value, digits = 1) => {
  if (value == null) return "–";
  const text = Math.abs(100 * value).toFixed(digits);
  return Number(text) === 0 ? text : (value > 0 ? "+" : "−") + text;
};
const minus = (a, b) => (a == null || b == null ? null : a - b);
const whole = (value) => (value == null ? "–" : d3.format(",")(value));

/** An element; children are elements, text or null. */
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null));
  return node;
}

function swatch(head) {
  const svg = d3.create("svg").attr("class", "swatch").attr("viewBox", "-6 -6 12 12").attr("aria-hidden", "true");
  svg.append("path").attr("d", d3.symbol(head.shape, 62)()).style("fill", head.colour);
  return svg.node();
}

/** Interval of the difference of ``head`` to the baseline in a figure, if the results hold it. */
function interval(head, key) {
  const difference = head.difference;
  return difference && difference.to === baseline().name ? (difference[key] ?? null) : null;
}

/** A chart with what it says for screen readers, and its numbers as a table behind it. */
function figure(parent, { chart, label, note, table, of = [] }) {
  for (const svg of chart.matches("svg") ? [chart] : chart.querySelectorAll("svg[class^=plot]")) {
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", svg.dataset.label ? `${label}: ${svg.dataset.label}` : label);
  }
  const behind = table
    ? el("details", {}, el("summary", {}, "Figures as a table"), sortable({ ...table, caption: label }))
    : null;
  const legend = of.length ? el("ul", { class: "key" }, of.map((head) => el("li", {}, swatch(head), head.name))) : null;
  parent.append(el("figure", {}, legend, chart, note ? el("figcaption", {}, note) : null, behind));
}

const LONGEST = 20;
const short = (name) => (name.length > LONGEST ? `${name.slice(0, LONGEST - 1)}…` : name);
const LABELS = () => 22 + 6.6 * Math.max(...heads.map((head) => short(head.name).length));

/** One chart per group side by side, with the heads' names on the left of each row; below each other on a phone. */
function panels(width, groups, draw) {
  const margin = Math.round(LABELS());
  const isNarrow = width < 560;
  const perRow = isNarrow ? 1 : Math.min(groups.length, Math.max(1, Math.floor((width - margin) / 150)));
  const inner = isNarrow ? width - margin : Math.min(260, Math.floor((width - margin) / perRow));
  return el("div", { class: "panels" }, groups.map((group, i) => {
    const isFirst = i % perRow === 0;
    const chart = draw(group, { width: inner + (isFirst ? margin : 0), marginLeft: isFirst ? margin : 10, isFirst });
    chart.dataset.label = group.label;
    const title = el("p", { style: `padding-left: ${isFirst ? margin : 10}px` }, group.label,
      el("small", {}, group.n ? `${group.n} ${group.n === 1 ? "category" : "categories"}` : ""));
    return el("div", { class: "panel" }, title, chart);
  }));
}

const PLAIN = { style: { background: "none", fontSize: "12px" } };

/** The axis of heads: names in order, as wide as ``panels`` says. */
function headAxis(shown, { isFirst }) {
  return {
    y: { domain: shown.map((head) => head.name), label: null, axis: null, padding: 0.3 },
    marks: isFirst ? [Plot.axisY({ tickSize: 0, label: null, tickFormat: short })] : [],
    height: 46 + 21 * shown.length,
  };
}

/** Which colour means what, where colours are not heads. */
const key = (parts) =>
  el("ul", { class: "key", "aria-label": "Colours" },
    Object.entries(parts).map(([, [text, colour]]) => el("li", {}, el("i", { style: `background: ${colour}` }), text)));

/** Powers of ten within the counts, for a logarithmic axis. */
const tens = (values) => d3.range(0, 8).map((k) => 10 ** k).filter((v) => v >= d3.min(values) && v <= d3.max(values));

const octave = (count) => Math.floor(Math.log2(Math.max(count, 1)));
