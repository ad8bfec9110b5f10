// What scores and errors say: calibration, confusion, kinds of false detections, the cap; and the heads themselves.
section("scores", "Are scores right?", () =>
  "Score against the share of detections with that score which are right (IoU 0.5), all categories together. On the diagonal scores say what they mean; below it they promise too much.",
(body, width) => {
  const shown = shownHeads().filter((head) => head.reliability);
  const points = shown.flatMap((head) => head.reliability.filter((bin) => bin.n > 0).map((bin) => ({ ...bin, head })));
  const chosen = (d) => d.head === focus() || d.head === baseline();
  const size = Math.min(width, 520);
  figure(body, {
    label: "Reliability diagram: precision against score", of: shown,
    chart: Plot.plot({
      ...PLAIN, width: size, height: size * 0.85, marginLeft: 46, marginBottom: 42, marginRight: 16,
      x: { domain: [0, 1], label: "mean score of the detections →", labelArrow: "none", grid: true, ticks: 5 },
      y: { domain: [0, 1], label: "↑ share that is right", labelArrow: "none", grid: true, ticks: 5 },
      color: { type: "identity" }, symbol: { type: "identity" },
      marks: [
        Plot.line([[0, 0], [1, 1]], { stroke: "currentColor", strokeDasharray: "4,3", strokeOpacity: 0.6 }),
        Plot.line(points, { x: "mean_score", y: "precision", z: (d) => d.head.name, stroke: (d) => d.head.colour, strokeWidth: (d) => (chosen(d) ? 2.6 : 1.3), strokeOpacity: (d) => (chosen(d) ? 1 : 0.75) }),
        Plot.dot(points, { x: "mean_score", y: "precision", fill: (d) => d.head.colour, symbol: (d) => d.head.symbol, r: 3.8 }),
        Plot.tip(points, Plot.pointer({ x: "mean_score", y: "precision", title: (d) =>
          `${d.head.name}\nscores ${d.low.toFixed(1)} to ${d.high.toFixed(1)}: ${whole(d.n)} detections\nmean score ${d.mean_score.toFixed(2)}, right ${percent(d.precision)} %` })),
      ],
    }),
    table: { rows: points, columns: [headColumn,
      { label: "scores", value: (bin) => `${bin.low.toFixed(1)} to ${bin.high.toFixed(1)}`, isWord: true },
      { label: "detections", value: (bin) => bin.n, text: whole },
      { label: "mean score", value: (bin) => bin.mean_score, text: (v) => v.toFixed(3) },
      { label: "right", value: (bin) => bin.precision, text: (v) => `${percent(v)} %` },
      { label: "mean overlap", value: (bin) => bin.mean_iou, text: (v) => v.toFixed(3) }] },
  });
  const measures = { "D-ECE": "all categories together", LaECE: "per category, with overlap", LaECE_0: "the same at IoU above 0", LRP: "localisation, recall, precision", oLRP: "the same at the best threshold" };
  const known = Object.keys(measures).filter((name) => shown.some((head) => head.calibration?.[name] >= 0));
  body.append(sortable({
    caption: "Calibration errors in percent, lower is better", rows: shown,
    columns: [headColumn, ...known.map((name) => ({ label: name.replace("_0", "₀"), value: (head) => head.calibration?.[name] ?? null, text: (v) => percent(v), best: "min" }))],
  }), el("p", { class: "note" }, known.map((name) => `${name.replace("_0", "₀")}: ${measures[name]}`).join("; ") + "."));
}, { missing: missing.reliability });

/** Bars of shares that fill each row: one panel per bin, a row per head. */
function shares(width, rows, parts, total, after) {
  const shown = shownHeads();
  return panels(width, shownBins(), (group, place) => {
    const of = rows.filter((row) => row.bin === group.bin && shown.some((head) => head.index === row.head));
    const bars = of.filter((row) => total(row) > 0).flatMap((row) => {
      let from = 0;
      return Object.entries(parts).map(([part, [text, colour]]) => {
        const share = row[part] / total(row);
        const bar = { row, text, colour, share, from, to: from + share, name: heads[row.head].name };
        from += share;
        return bar;
      });
    });
    const axis = headAxis(shown, place);
    return Plot.plot({
      ...PLAIN, width: place.width, height: axis.height, marginLeft: place.marginLeft, marginRight: after ? 34 : 20, marginTop: 4, marginBottom: 30,
      x: { domain: [0, 1], label: null, ticks: [0, 0.5, 1], tickFormat: (v) => (v === 1 ? "100 %" : String(100 * v)) }, y: axis.y, color: { type: "identity" },
      marks: [
        ...axis.marks,
        Plot.barX(bars, { x1: "from", x2: "to", y: "name", fill: "colour", insetRight: 0.5 }),
        after ? Plot.text(of.filter((row) => total(row) > 0), { x: 1, y: (row) => heads[row.head].name, text: after, textAnchor: "start", dx: 4, fill: "currentColor" }) : null,
        Plot.tip(bars, Plot.pointer({ x: (d) => (d.from + d.to) / 2, y: "name", maxRadius: 60, title: (d) => `${d.name}\n${d.text}: ${percent(d.share)} %` })),
      ],
    });
  });
}

const taken = {
  right: ["its own class", "var(--part-0)"],
  same: ["another of its bin", "var(--part-1)"],
  rarer: ["a rarer class", "var(--part-2)"],
  frequent: ["a more frequent class", "var(--part-3)"],
  nothing: ["covered by nothing", "var(--part-4)"],
};
const allOf = (row) => d3.sum(Object.keys(taken), (part) => row[part]);
const rowsOf = (rows) => rows.filter((row) => state.heads.has(row.head) && shownBins().some((group) => group.bin === row.bin));
const placeColumns = [
  { label: "head", value: (row) => heads[row.head].name, node: (row) => swatch(heads[row.head]), isWord: true },
  { label: "training instances", value: (row) => bins.find((group) => group.bin === row.bin).label, isWord: true },
];

if (bins.length) {
  section("confusion", "What objects are taken for", () =>
    "The class of the best-scored detection that covers an object (IoU at least 0.5), before any cap, by the training instances of the object's class.",
  (body, width) => {
    const { outcomes, pairs } = data.confusion;
    body.append(key(taken));
    figure(body, {
      label: "What objects are taken for, per head and bin",
      chart: shares(width, outcomes, taken, allOf),
      table: { rows: rowsOf(outcomes), columns: [...placeColumns,
        ...Object.entries(taken).map(([part, [text]]) => ({ label: text, value: (row) => row[part] / allOf(row), text: (v) => `${percent(v)} %` })),
        { label: "objects", value: allOf, text: whole }] },
    });
    if (!pairs.length) return;
    const compared = isAlone() ? [focus()] : [baseline(), focus()];
    body.append(el("h3", {}, "Rare objects under wrong names"), sortable({
      caption: `Objects of classes with ${bins[0].label} training instances, by what they are called`,
      rows: pairs.filter((pair) => compared.some((head) => pair.n[head.index])), limit: 12, sort: { column: 4, down: true },
      columns: [
        { label: "class", value: (pair) => pair.category, isWord: true },
        { label: "its instances", value: (pair) => pair.count, text: whole },
        { label: "taken for", value: (pair) => pair.taken, isWord: true },
        { label: "its instances", value: (pair) => pair.takenCount, text: whole },
        ...compared.map((head) => ({ label: head.name, value: (pair) => pair.n[head.index], text: whole })),
      ],
    }));
  }, { missing: missing.confusion });

  const kinds = {
    duplicate: ["duplicate", "var(--part-2)"],
    poor_box: ["poor box", "var(--part-1)"],
    wrong_class: ["wrong class", "var(--part-3)"],
    background: ["background", "var(--part-4)"],
    other: ["wrong class and poor box", "var(--part-5)"],
  };
  const falseOf = (row) => d3.sum(Object.keys(kinds), (kind) => row[kind]);
  section("kinds", "Kinds of false detections", () =>
    "Of the detections that count and are false, by the training instances of the class they name; the number behind each bar is false detections per true one.",
  (body, width) => {
    body.append(key(kinds));
    figure(body, {
      label: "Kinds of false detections, per head and bin",
      chart: shares(width, data.falseKinds, kinds, falseOf, (row) => (row.n_true ? (row.n_false / row.n_true).toFixed(1) : row.n_false ? "∞" : "")),
      note: "∞: no true detection at all.",
      table: { rows: rowsOf(data.falseKinds), columns: [...placeColumns,
        { label: "true", value: (row) => row.n_true, text: whole }, { label: "false", value: (row) => row.n_false, text: whole },
        ...Object.entries(kinds).map(([kind, [text]]) => ({ label: text, value: (row) => row[kind], text: whole }))] },
    });
  }, { missing: missing.kinds });

  section("cap", missing.cut ? "What the cap cuts" : `What the cap of ${whole(data.cap)} cuts`, () =>
    `Share of the true detections of each bin that ${whole(data.cap)} or more better-scored detections of the same image push out.`,
  (body, width) => {
    const rows = rowsOf(data.cut).map((row) => ({ ...row, it: heads[row.head], label: bins.find((g) => g.bin === row.bin).label, share: 100 * row.share_cut }));
    const chosen = (d) => d.it === focus() || d.it === baseline();
    figure(body, {
      label: "Share of true detections cut by the cap, per head and bin", of: shownHeads(),
      chart: Plot.plot({
        ...PLAIN, width: Math.min(width, 640), height: 320, marginLeft: 46, marginBottom: 44, marginRight: 20,
        x: { type: "point", domain: shownBins().map((g) => g.label), axis: null },
        y: { label: "↑ % of true detections cut", labelArrow: "none", grid: true, nice: true, zero: true, ticks: 5 },
        color: { type: "identity" }, symbol: { type: "identity" },
        marks: [
          Plot.axisX({ label: "training instances of the class", labelAnchor: "center", labelArrow: "none", lineWidth: width < 560 ? 5 : 20 }),
          Plot.line(rows, { x: "label", y: "share", z: (d) => d.it.name, stroke: (d) => d.it.colour, strokeWidth: (d) => (chosen(d) ? 2.6 : 1.3), strokeOpacity: (d) => (chosen(d) ? 1 : 0.75) }),
          Plot.dot(rows, { x: "label", y: "share", fill: (d) => d.it.colour, symbol: (d) => d.it.symbol, r: 4.4 }),
          Plot.tip(rows, Plot.pointer({ x: "label", y: "share", title: (d) => `${d.it.name}, ${d.label}\n${whole(d.n_cut)} of ${whole(d.n_true)} true detections cut: ${d.share.toFixed(1)} %` })),
        ],
      }),
      table: { rows: rowsOf(data.cut), columns: [...placeColumns,
        { label: "true", value: (row) => row.n_true, text: whole }, { label: "cut", value: (row) => row.n_cut, text: whole },
        { label: "share", value: (row) => row.share_cut, text: (v) => `${percent(v)} %` },
        { label: "median rank", value: (row) => row.median_rank, text: (v) => v.toFixed(0) }] },
    });
  }, { missing: missing.cut });

  const normOf = (head, category) => head.fitted?.norms?.[category.index] ?? null;
  section("norms", "Weight norms against training instances", () =>
    "Length of each category's weights over the head's mean. A classifier whose lengths rise with the count favours frequent classes whatever it sees. Heads of several classifiers are left out.",
  (body, width) => {
    const from = shownHeads().filter((head) => head.fitted?.norms);
    const of = categories.filter(isShown);
    figure(body, {
      label: "Norm of the weights of categories against their training instances", of: from,
      chart: overCount({ width, of, from, value: normOf, text: (v) => `${v.toFixed(2)} of the mean`, yLabel: "norm over mean norm" }),
      table: byOctave(of, from, normOf, (v) => (v == null || Number.isNaN(v) ? "–" : v.toFixed(2))),
    });
  }, { missing: missing.norms });
}

section("training", "Training", () =>
  "Loss over its value at the start of each stage. Methods minimise different things: look at whether each came to rest, not at who is lowest.",
(body, width) => {
  const rows = [];
  for (const head of shownHeads()) {
    let before = 0;
    (head.fitted?.stages ?? []).forEach((stage, number) => {
      for (const [step, loss] of stage) rows.push({ head, number, step: before + step, loss, share: loss / stage[0][1], id: `${head.name} ${number}` });
      before += stage.at(-1)[0];
    });
  }
  const isUsable = rows.every((row) => row.share > 0);
  const ends = [...d3.rollup(rows, (of) => of.at(-1), (row) => row.id).values()];
  figure(body, {
    label: "Loss over training steps", of: shownHeads().filter((head) => head.fitted?.stages.length),
    chart: Plot.plot({
      ...PLAIN, width: Math.min(width, 860), height: Math.min(width * 0.7, 340), marginLeft: 50, marginBottom: 42, marginRight: 16,
      x: { label: "step →", labelArrow: "none", grid: true, tickFormat: "~s", ticks: 6 },
      y: { type: isUsable ? "log" : "linear", label: "↑ loss over first loss", labelArrow: "none", grid: true, ticks: 5, tickFormat: "~g" },
      color: { type: "identity" }, symbol: { type: "identity" },
      marks: [
        Plot.line(rows, { x: "step", y: "share", z: "id", stroke: (d) => d.head.colour, strokeWidth: 1.6 }),
        Plot.dot(ends, { x: "step", y: "share", fill: (d) => d.head.colour, symbol: (d) => d.head.symbol, r: 4.4 }),
        Plot.tip(rows, Plot.pointer({ x: "step", y: "share", maxRadius: 30, title: (d) => `${d.head.name}${d.number ? `, stage ${d.number + 1}` : ""}\nstep ${whole(Math.round(d.step))}: loss ${d.loss.toPrecision(3)}` })),
      ],
    }),
    note: "Heads that are not trained have no curve.",
    table: { rows: ends, columns: [
      { label: "head", value: (row) => row.head.name, node: (row) => swatch(row.head), isWord: true },
      { label: "stage", value: (row) => row.number + 1 },
      { label: "last loss", value: (row) => row.loss, text: (v) => v.toPrecision(3) },
      { label: "over first", value: (row) => row.share, text: (v) => v.toPrecision(3) }] },
  });
}, { missing: missing.training });
