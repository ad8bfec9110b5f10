// Pictures with the detections of the two heads that are compared.
const COLOURS = { right: "#37d6a0", wrong: "#ff8a4d", missed: "#ffffff" };

section("examples", heads.length > 1 ? "Pictures, before and after" : "Pictures", () =>
  "Each head shows its best detections, as many as the picture has annotated objects. " + (heads.length > 1
    ? `Chosen are those in which ${heads[data.best].name} names most more rare objects rightly than ${heads[data.baseline].name}, then some in which it loses most. `
    : "Chosen are those with most rare objects named rightly. ") +
  "Detections of classes that are not annotated in a picture are drawn only where they cover an object.",
(body) => {
  body.append(el("ul", { class: "key", "aria-label": "Colours" }, [["right", COLOURS.right, "solid"], ["wrong", COLOURS.wrong, "dashed"], ["missed object", "currentColor", "dotted"]].map(([text, colour, line]) =>
    el("li", {}, el("i", { style: `border: 2px ${line} ${colour}; width: 16px` }), text))));
  for (const example of data.examples) body.append(pictures(example));
}, { missing: missing.examples });

const nameOf = (index) => (index == null ? "a class of no category" : columns.name[index]);

function pictures(example) {
  const compared = (isAlone() ? [focus()] : [baseline(), focus()]).filter((head) => example.found[head.index]);
  const objects = d3.rollups(example.objects, (of) => of.length, (object) => object.category)
    .sort((a, b) => (columns.count[a[0]] ?? 0) - (columns.count[b[0]] ?? 0))
    .map(([category, n]) => `${n > 1 ? `${n} × ` : ""}${nameOf(category)} (${whole(columns.count[category])})`);
  return el("figure", { class: "example" },
    el("div", { class: "pair" }, compared.map((head) => picture(example, head))),
    el("figcaption", {}, `Image ${example.id}. Objects, with training instances of their class: ${objects.join(", ")}.`));
}

function picture(example, head) {
  const found = example.found[head.index];
  const isRight = (detection) => detection.kind === "true";
  const hit = new Set(found.filter(isRight).map((detection) => detection.object));
  const missed = example.objects.filter((object) => !hit.has(object.id));
  const KINDS = { true: "right", duplicate: "found twice", poor_box: "poor box", wrong_class: "wrong class", background: "background", other: "wrong class and poor box", unjudged: "wrong class", ignored: "does not count" };
  const box = (name, { box: [x, y, w, h] }, title, label) =>
    el("span", { class: `${name}${y < 0.05 ? " low" : ""}${x + w > 0.7 ? " far" : ""}`, title, style: `color: ${COLOURS[name]}; left: ${100 * x}%; top: ${100 * y}%; width: ${100 * w}%; height: ${100 * h}%` },
      label ? el("b", {}, label) : null);
  const boxes = [
    ...missed.map((object) => box("missed", object, `missed: ${nameOf(object.category)}`)),
    ...[...found].sort((a, b) => isRight(a) - isRight(b)).map((d) =>
      box(isRight(d) ? "right" : "wrong", d, `${nameOf(d.category)} ${d.score.toFixed(2)}: ${KINDS[d.kind]}`, nameOf(d.category))),
  ];
  const told = found.map((d) => `${nameOf(d.category)}, ${KINDS[d.kind]}`).join("; ");
  return el("div", {}, el("p", {}, swatch(head), ` ${head.name}: ${hit.size} of ${example.objects.length} objects right`),
    el("div", { class: "picture" },
      el("img", { src: example.uri, width: example.width, height: example.height, alt: `Detections of ${head.name}: ${told || "none"}` }),
      el("div", { "aria-hidden": "true" }, boxes)));
}

start();
