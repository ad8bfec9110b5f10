// Average precision: the summary, all metrics, per bin, rare against frequent, and per category.
const missing = data.missing;
const isWhole = (key) => key && heads.some((head) => head.metrics[key] != null);

section("summary", "Summary", "", (body) => {
  const [head, base] = [focus(), baseline()];
  const change = (key) => minus(head.metrics[key], base.metrics[key]);
  const more = change("AP");
  const rank = [...heads].sort(byAP).indexOf(head);
  const place = rank === 0 ? "has the highest AP" : `is number ${rank + 1} by AP`;
  const against = (key, what) => {
    const value = change(key);
    if (value == null) return "";
    return Number((100 * value).toFixed(1)) === 0 ? `${what} neither gain nor lose` : `${what} ${value > 0 ? "gain" : "lose"} ${percent(Math.abs(value))}`;
  };
  const words = isAlone()
    ? `${head.name}: AP ${percent(head.metrics.AP)}.` + (heads.length === 1 ? " One head only: give more result folders to compare." : " It is compared with itself: choose another head.")
    : `${head.name} ${place} of ${heads.length} heads: ${percent(head.metrics.AP)}, ${signed(more)} over ${base.name}.`;
  const rareAndFrequent = isAlone() || !rareKey ? "" :
    ` ${[rareKey, ...(rareKey === frequentKey ? [] : [frequentKey])].map((key) => against(key, groupName(key))).filter(Boolean).join(", ")}.`;
  if (data.notes.length) body.append(el("ul", { class: "notes" }, data.notes.map((note) => el("li", {}, note))));
  body.append(el("p", { class: "lead" }, words + capital(rareAndFrequent)));
  const keys = ["AP", ...(isWhole("APr") ? ["APr", "APc", "APf"] : bins.map((g) => g.key))].filter(isWhole);
  body.append(el("dl", { class: "tiles" }, keys.map((key) => tile(key, head, base))));
});

const groupName = (key) => ({ APr: "rare classes", APf: "frequent classes" })[key] ?? `classes of ${groupOf(key).label} training instances`;
const capital = (text) => text.replace(/[a-z]/, (letter) => letter.toUpperCase());

function tile(key, head, base) {
  const value = minus(head.metrics[key], base.metrics[key]);
  const between = isAlone() ? null : interval(head, key);
  const kind = value == null || Number((100 * value).toFixed(1)) === 0 ? "" : value > 0 ? "up" : "down";
  const group = groupOf(key);
  return el("div", { class: "tile" },
    el("dt", {}, group ? capital(group.label) : "All categories", group ? ` (${group.n})` : ` (${data.nCategories})`),
    el("dd", { class: `change ${isAlone() ? "" : kind}` }, isAlone() ? percent(head.metrics[key]) : signed(value)),
    isAlone() ? null : el("dd", { class: "small" }, `${percent(base.metrics[key])} → ${percent(head.metrics[key])}`),
    between ? el("dd", { class: "small" }, `95 %: ${signed(between.low)} to ${signed(between.high)}`) : null);
}

section("heads", "Every head", () =>
  isAlone() ? "" : `AP of all categories, its gain over ${baseline().name}, and AP of groups: by training instances, and as the data set calls them. The best of each column is bold.${state.heads.size < heads.length ? ` ${state.heads.size} of ${heads.length} heads are shown, here and below: the filters choose others.` : ""}`,
(body) => {
  const rows = shownHeads();
  const metrics = shownGroups().map((group) => ({
    label: group.label, value: (head) => head.metrics[group.key], text: (v) => percent(v), best: "max",
  }));
  body.append(sortable({
    caption: "Average precision of every head",
    rows, sort: { column: 1, down: true },
    classOf: (head) => (head.index === state.baseline && heads.length > 1 ? "is-baseline" : null),
    columns: [
      headColumn,
      { label: "AP", value: (head) => head.metrics.AP, text: (v) => percent(v), best: "max" },
      ...(heads.length > 1 ? [{ label: "gain", value: (head) => minus(head.metrics.AP, baseline().metrics.AP), text: (v, head) => (head === baseline() ? "" : signed(v)) }] : []),
      ...metrics,
    ],
  }));
});

section("bins", "AP per bin", () => {
  const whiskers = heads.some((head) => interval(head, "AP"))
    ? ` Whiskers: 95 % bootstrap interval of the difference to ${baseline().name}, paired over images; one that keeps clear of the line is a difference that another draw of images would show too.`
    : "";
  return `Each panel has its own scale${heads.length > 1 ? `; the dashed line is ${baseline().name}` : ""}.${whiskers}`;
}, (body, width) => {
  const shown = shownHeads();
  const all = { key: "AP", label: "all categories", n: data.nCategories };
  const chosen = shownGroups();
  const rows = [[all, ...chosen.filter((g) => g.bin !== null)], chosen.filter((g) => g.bin === null)].filter((r) => r.length);
  for (const groups of rows) {
    figure(body, {
      chart: panels(width, groups, (group, place) => dots(group, shown, place)),
      label: groups[0] === all ? "AP of every head per bin of training instances" : "AP of every head in rare, common and frequent categories",
      table: headsByGroup(shown, groups, (head, group) => head.metrics[group.key], (v) => percent(v)),
    });
  }
});

function dots(group, shown, place) {
  const base = baseline().metrics[group.key];
  const rows = shown.filter((head) => head.metrics[group.key] != null).map((head) => {
    const between = interval(head, group.key);
    return { head, ap: 100 * head.metrics[group.key], low: between && 100 * (base + between.low), high: between && 100 * (base + between.high), between };
  });
  const axis = headAxis(shown, place);
  const [low, high] = d3.extent([...rows.flatMap((row) => [row.ap, row.low, row.high]), base == null ? null : 100 * base]);
  return Plot.plot({
    ...PLAIN, width: place.width, height: axis.height, marginLeft: place.marginLeft, marginRight: 14, marginTop: 4, marginBottom: 30,
    x: { domain: [Math.min(low, high - 2), Math.max(high, low + 2)], label: null, nice: true, ticks: 4, inset: 6, grid: true }, y: axis.y,
    marks: [
      ...axis.marks,
      base == null || heads.length === 1 ? null : Plot.ruleX([100 * base], { stroke: "currentColor", strokeDasharray: "4,3", strokeOpacity: 0.7 }),
      Plot.ruleY(rows.filter((row) => row.between), { x1: "low", x2: "high", y: (d) => d.head.name, stroke: (d) => d.head.colour, strokeWidth: 3, strokeOpacity: 0.45 }),
      Plot.dot(rows, { x: "ap", y: (d) => d.head.name, fill: (d) => d.head.colour, symbol: (d) => d.head.symbol, r: 4.6 }),
      Plot.tip(rows, Plot.pointer({ x: "ap", y: (d) => d.head.name, maxRadius: 24, title: (d) =>
        `${d.head.name}\n${d.ap.toFixed(1)} AP` + (d.head === baseline() || base == null ? "" : `, ${signed(d.ap / 100 - base)} over ${baseline().name}`) +
        (d.between ? `\n95 %: ${signed(d.between.low)} to ${signed(d.between.high)}` : "") })),
    ],
    symbol: { type: "identity" }, color: { type: "identity" },
  });
}

if (heads.length > 1 && isWhole(rareKey) && isWhole(frequentKey) && rareKey !== frequentKey) {
  section("front", "Rare against frequent", () =>
    "Up and right is better. No head beats one on the front in one of the two without falling behind in the other.",
  (body, width) => {
    const rows = shownHeads().map((head) => ({ head, x: 100 * head.metrics[frequentKey], y: 100 * head.metrics[rareKey] }));
    const front = rows.filter((a) => !rows.some((b) => b.x >= a.x && b.y >= a.y && (b.x > a.x || b.y > a.y))).sort((a, b) => a.x - b.x);
    const labels = groupOf(rareKey).label;
    figure(body, {
      label: `AP of ${labels} against ${groupOf(frequentKey).label} categories`,
      note: `On the front, from left to right: ${front.map((row) => row.head.name).join(", ")}.`,
      chart: Plot.plot({
        ...PLAIN, width: Math.min(width, 760), height: Math.min(width * 0.85, 430), marginLeft: 44, marginBottom: 42, marginRight: 20, inset: 14,
        x: { label: `AP, ${groupOf(frequentKey).label} →`, nice: true, grid: true, ticks: 6, labelArrow: "none" },
        y: { label: `↑ AP, ${labels}`, nice: true, grid: true, ticks: 6, labelArrow: "none" },
        color: { type: "identity" }, symbol: { type: "identity" },
        marks: [
          Plot.line(front, { x: "x", y: "y", stroke: "currentColor", strokeOpacity: 0.4, strokeDasharray: "5,4" }),
          Plot.dot(rows, { x: "x", y: "y", fill: (d) => d.head.colour, symbol: (d) => d.head.symbol, r: 6 }),
          names(rows),
          Plot.tip(rows, Plot.pointer({ x: "x", y: "y", title: (d) => `${d.head.name}\n${labels} ${d.y.toFixed(1)}, ${groupOf(frequentKey).label} ${d.x.toFixed(1)}` })),
        ],
      }),
      table: headsByGroup(shownHeads(), [groupOf(rareKey), groupOf(frequentKey)], (head, group) => head.metrics[group.key], (v) => percent(v)),
    });
  });
}

/** Names beside points: pushed apart where they would cover each other, left of the point near the right edge. */
function names(rows) {
  return (index, scales, values, dimensions) => {
    const g = d3.create("svg:g").attr("fill", "currentColor").attr("font-size", 11.5).attr("text-anchor", "start").attr("stroke", "var(--paper)").attr("stroke-width", 4).attr("stroke-linejoin", "round").attr("paint-order", "stroke").attr("aria-hidden", "true");
    const taken = rows.map((row) => ({ x0: scales.x(row.x) - 7, x1: scales.x(row.x) + 7, y0: scales.y(row.y) - 7, y1: scales.y(row.y) + 7 }));
    const isFree = (box) => taken.every((t) => box.x1 < t.x0 || box.x0 > t.x1 || box.y1 < t.y0 || box.y0 > t.y1);
    for (const row of rows) {
      const [x, y, size] = [scales.x(row.x), scales.y(row.y), 6.4 * row.head.name.length];
      const places = [0, -13, 13, -25, 25].flatMap((dy) => [[11, dy], [-11 - size, dy]]);
      const at = places.find(([dx, dy]) => x + dx > dimensions.marginLeft && x + dx + size < dimensions.width - 4 &&
        isFree({ x0: x + dx, x1: x + dx + size, y0: y + dy - 6, y1: y + dy + 6 }));
      if (!at) continue; // crowded: the pointer and the table name it
      taken.push({ x0: x + at[0], x1: x + at[0] + size, y0: y + at[1] - 6, y1: y + at[1] + 6 });
      g.append("text").attr("x", x + at[0]).attr("y", y + at[1]).attr("dy", "0.32em").text(row.head.name);
    }
    return g.node();
  };
}

const columns = data.categories;
const categories = columns.id.map((id, i) => ({
  index: i, name: columns.name[i], count: columns.count[i], bin: columns.bin[i], objects: columns.objects[i],
  frequency: columns.frequency[i],
  at: Math.max(columns.count[i] ?? 0, 1), // on a logarithmic axis, 0 stands with 1
}));
const apOf = (head, category) => columns.ap[head.index][category.index];
const isShown = (category) => {
  const chosen = new Set(shownBins().map((group) => group.bin));
  return bins.length === 0 || chosen.has(category.bin);
};
const COUNT = { type: "log", label: "training instances of the category →", labelArrow: "none", ticks: tens(categories.map((c) => c.at)), tickFormat: ",", grid: true, insetLeft: 8 };

/** Mean of a value over the categories of each doubling of the count. */
function octaves(of, value) {
  const known = of.filter((category) => value(category) != null);
  return [...d3.group(known, (category) => octave(category.at))]
    .map(([, members]) => ({ x: Math.exp(d3.mean(members, (m) => Math.log(m.at))), y: d3.mean(members, value), n: members.length }))
    .sort((a, b) => a.x - b.x);
}

/** One line per head over the count, with the categories of the chosen head as dots behind. */
function overCount({ width, value, of, text, yLabel, from }) {
  const lines = from.flatMap((head) => octaves(of, (c) => value(head, c)).map((point) => ({ ...point, head })));
  const cloud = of.filter((c) => from.includes(focus()) && value(focus(), c) != null).map((c) => ({ x: c.at, y: value(focus(), c), category: c }));
  const chosen = (d) => d.head === focus() || d.head === baseline();
  return Plot.plot({
    ...PLAIN, width: Math.min(width, 860), height: Math.min(width * 0.8, 420), marginLeft: 46, marginBottom: 42, marginRight: 16,
    x: COUNT, y: { label: `↑ ${yLabel}`, labelArrow: "none", grid: true, nice: true, ticks: 6 },
    color: { type: "identity" }, symbol: { type: "identity" },
    marks: [
      Plot.dot(cloud, { x: "x", y: "y", fill: focus().colour, fillOpacity: 0.28, r: 2.8 }),
      Plot.line(lines, { x: "x", y: "y", z: (d) => d.head.name, stroke: (d) => d.head.colour, strokeWidth: (d) => (chosen(d) ? 2.6 : 1.3), strokeOpacity: (d) => (chosen(d) ? 1 : 0.75) }),
      Plot.dot(lines, { x: "x", y: "y", fill: (d) => d.head.colour, symbol: (d) => d.head.symbol, r: 3.6 }),
      Plot.tip([...lines, ...cloud], Plot.pointer({ x: "x", y: "y", maxRadius: 30, title: (d) => d.head
        ? `${d.head.name}\n${text(d.y)}, mean of ${d.n} categories\nwith about ${whole(Math.round(d.x))} instances`
        : `${d.category.name}\n${whole(d.category.count)} instances\n${focus().name}: ${text(d.y)}` })),
    ],
  });
}

/** The table behind ``overCount``: heads by doublings of the count. */
function byOctave(of, from, value, text) {
  const all = [...d3.group(of, (c) => octave(c.at))].sort((a, b) => a[0] - b[0]);
  const groups = all.map(([k, members]) => ({ label: k === 0 ? "0 or 1" : `${whole(2 ** k)} to ${whole(2 ** (k + 1) - 1)}`, members }));
  return headsByGroup(from, groups, (head, group) => d3.mean(group.members, (c) => value(head, c) ?? NaN) ?? null, text);
}

if (bins.length) {
  section("counts", "AP against training instances", () =>
    `Lines: mean of the categories of each doubling of the count. Dots: the categories of ${focus().name}. A head that treats classes alike is flat.`,
  (body, width) => {
    const of = categories.filter(isShown);
    figure(body, {
      label: "AP of categories against their training instances",
      of: shownHeads(),
      chart: overCount({ width, of, from: shownHeads(), value: (h, c) => (apOf(h, c) == null ? null : 100 * apOf(h, c)), text: (v) => `${v.toFixed(1)} AP`, yLabel: "AP" }),
      table: byOctave(of, shownHeads(), apOf, (v) => percent(v)),
    });
  });
}

let sought = "";
if (heads.length > 1) {
  section("categories", "Categories gained and lost", () =>
    isAlone() ? "A head is compared with itself: choose another one." : `AP of ${focus().name} minus AP of ${baseline().name}, per category. ${movedText()}`,
  (body, width) => {
    if (isAlone()) return;
    const rows = categories.filter((c) => isShown(c) && gainOf(c) != null);
    if (bins.length) figure(body, { label: `Gain of ${focus().name} over ${baseline().name} per category against training instances`, chart: gains(rows, width) });
    // The section is drawn again with every filter; what was typed stays.
    const find = el("input", { type: "search", value: sought, placeholder: "part of a name", "aria-label": "Find categories by name" });
    const place = el("div");
    const fill = () => {
      sought = find.value;
      place.replaceChildren(gainTable(rows.filter((c) => c.name.toLowerCase().includes(sought.toLowerCase()))));
    };
    find.addEventListener("input", fill);
    fill();
    body.append(el("label", { class: "find" }, "Find a category", find), place);
  });
}

const gainOf = (category) => minus(apOf(focus(), category), apOf(baseline(), category));
const MOVED = 0.001;

function movedText() {
  const told = (of) => {
    const gain = of.map(gainOf).filter((v) => v != null);
    return `${gain.filter((v) => v > MOVED).length} gain and ${gain.filter((v) => v < -MOVED).length} lose`;
  };
  const groups = shownBins().map((group) => `${group.label}: ${told(categories.filter((c) => c.bin === group.bin))}`);
  return groups.length ? `By training instances, ${groups.join("; ")}.` : capital(`${told(categories)}.`);
}

function gains(rows, width) {
  const points = rows.map((c) => ({ c, x: c.at, y: 100 * gainOf(c) }));
  const is = (d) => (d.y > 0 ? "var(--good)" : d.y < 0 ? "var(--bad)" : "var(--muted)");
  return Plot.plot({
    ...PLAIN, width: Math.min(width, 860), height: Math.min(width * 0.7, 320), marginLeft: 46, marginBottom: 42, marginRight: 16,
    x: COUNT, y: { label: "↑ gain in AP", labelArrow: "none", grid: true, nice: true, ticks: 6, tickFormat: "+d" },
    color: { type: "identity" },
    marks: [
      Plot.ruleY([0], { stroke: "currentColor" }),
      Plot.dot(points, { x: "x", y: "y", fill: is, fillOpacity: 0.75, r: 3.4 }),
      Plot.tip(points, Plot.pointer({ x: "x", y: "y", maxRadius: 30, title: (d) =>
        `${d.c.name}\n${whole(d.c.count)} instances\n${percent(apOf(baseline(), d.c))} → ${percent(apOf(focus(), d.c))}` })),
    ],
  });
}

function gainTable(rows) {
  return sortable({
    caption: `AP of ${rows.length} categories`, rows, limit: 12, sort: { column: 5, down: true },
    columns: [
      { label: "category", value: (c) => c.name, isWord: true },
      { label: "training instances", value: (c) => c.count, text: whole },
      { label: "objects in the split", value: (c) => c.objects, text: whole },
      { label: baseline().name, value: (c) => apOf(baseline(), c), text: (v) => percent(v) },
      { label: focus().name, value: (c) => apOf(focus(), c), text: (v) => percent(v) },
      { label: "gain", value: gainOf, text: (v) => signed(v) },
    ],
  });
}
