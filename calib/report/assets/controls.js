// Contents and filters on the left, and drawing everything again when one of them changes.
const sections = [];

const lacking = new Map(); // titles of what is missing, by the line that says how to get it

/** A section of the page; ``draw(body, width)`` fills it. With a line ``missing`` it stands in the last section instead. */
function section(id, title, lead, draw, { missing = null } = {}) {
  if (missing) lacking.set(missing, [...(lacking.get(missing) ?? []), title]);
  else sections.push({ id, title, lead, draw });
}

function lackingSection() {
  for (const [name, title] of [["intervals", "Bootstrap intervals"], ["bins", "Bins of training instances"]]) {
    if (data.missing[name]) lacking.set(data.missing[name], [title]);
  }
  if (!lacking.size) return;
  section("lacking", "Not in this report", "What these results do not hold, and how to get it.", (body) => {
    body.append(el("dl", { class: "lacking" }, [...lacking].map(([line, titles]) => [el("dt", {}, titles.join("; ")), el("dd", {}, line)]).flat()));
  });
}

function choice(label, value, set) {
  const select = el("select", { onchange: () => { set(Number(select.value)); redraw(); } },
    [...heads].sort(byAP).map((head) => el("option", { value: head.index, selected: head.index === value }, head.name)));
  return el("label", { class: "choice" }, el("span", {}, label), select);
}

function checks(title, items, chosen, keyOf, content) {
  const box = (item) => {
    const input = el("input", { type: "checkbox", checked: chosen.has(keyOf(item)), onchange: () => {
      if (input.checked) chosen.add(keyOf(item)); else chosen.delete(keyOf(item));
      redraw();
    } });
    return el("label", {}, input, content(item));
  };
  const boxes = items.map(box);
  const toggle = el("button", { type: "button", class: "all", "aria-label": `${title}: all or none`, onclick: () => {
    const all = chosen.size < items.length;
    items.forEach((item) => (all ? chosen.add(keyOf(item)) : chosen.delete(keyOf(item))));
    boxes.forEach((label) => { label.querySelector("input").checked = all; });
    redraw();
  } }, "all / none");
  return el("fieldset", {}, el("legend", {}, title), el("div", {}, toggle, ...boxes));
}

function fillControls() {
  const filters = document.getElementById("filters");
  filters.addEventListener("submit", (event) => event.preventDefault());
  if (heads.length > 1) {
    filters.append(
      el("fieldset", {}, el("legend", {}, "Compare"), el("div", {},
        choice("head", state.focus, (i) => { state.focus = i; }),
        choice("with", state.baseline, (i) => { state.baseline = i; }))),
      checks("Heads", [...heads].sort(byAP), state.heads, (head) => head.index, (head) => [swatch(head), el("span", {}, head.name)]));
  }
  if (data.groups.length > 1) {
    filters.append(checks("Training instances", data.groups, state.groups, (group) => group.key,
      (group) => [el("span", {}, group.label)]));
  }
}

function build() {
  const main = document.getElementById("main");
  for (const each of sections) {
    each.body = el("div");
    each.lead_ = el("p");
    main.append(el("section", { id: each.id, "aria-labelledby": `${each.id}-title` },
      el("h2", { id: `${each.id}-title` }, each.title), each.lead_, each.body));
    document.getElementById("contents").append(el("li", {}, el("a", { href: `#${each.id}` }, each.title)));
  }
  fillControls();
  const phone = matchMedia("(max-width: 60rem)");
  const fold = () => { document.getElementById("controls").open = !phone.matches; };
  phone.addEventListener("change", fold);
  fold();
  const cap = data.cap < 0 ? "all detections" : `at most ${whole(data.cap)} detections per image${data.style === "coco" ? " and category" : ""}`;
  document.getElementById("origin").textContent =
    `${heads.length} ${heads.length === 1 ? "head" : "heads"} · ${whole(data.nCategories)} categories · ${cap} · ${data.style === "coco" ? "COCO" : "LVIS"} ${data.iouType === "segm" ? "mask" : "box"} AP in percent`;
  document.getElementById("foot").append(
    el("p", {}, `Written by calib ${data.version} on ${data.written}. Every AP is the mean over categories at IoU 0.50 to 0.95; a group's is the mean of its categories that have objects in the split. Figures come from the result folders as they are.`),
    el("p", {}, "The charts are made with d3 and Observable Plot (ISC licence, copyright Mike Bostock and Observable, Inc.). This page loads nothing and sends nothing."));
}

let width = 0;
function redraw() {
  width = Math.floor(document.getElementById("main").getBoundingClientRect().width);
  for (const each of sections) {
    const at = [...each.body.querySelectorAll("details")].map((details) => details.open);
    each.lead_.textContent = typeof each.lead === "function" ? each.lead() : each.lead;
    const body = el("div");
    if (!["summary", "lacking"].includes(each.id) && state.heads.size === 0) body.append(el("p", { class: "missing" }, "No head is chosen."));
    else each.draw(body, width);
    each.body.replaceChildren(body);
    [...each.body.querySelectorAll("details")].forEach((details, i) => { details.open = at[i] ?? false; });
  }
}

function start() {
  lackingSection();
  build();
  redraw();
  let waiting = 0;
  new ResizeObserver(() => {
    if (Math.abs(document.getElementById("main").getBoundingClientRect().width - width) < 2) return;
    cancelAnimationFrame(waiting);
    waiting = requestAnimationFrame(redraw);
  }).observe(document.getElementById("main"));
  document.documentElement.dataset.ready = "true";
}
