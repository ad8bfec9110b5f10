// Tables that are sorted by their headers.

/** columns: {label, value(row), text(value, row)?, isWord?, node(row)?, best: "max" | "min"?}; the first names the row. */
function sortable({ caption, columns, rows, sort = null, limit = Infinity, classOf = () => null }) {
  let order = sort ?? { column: -1, down: true };
  let isWhole = rows.length <= limit;
  const body = el("tbody");
  const header = el("tr", {}, columns.map((column, i) =>
    el("th", { scope: "col", class: column.isWord ? "word" : null },
      el("button", { type: "button", onclick: () => sortBy(i) }, column.label))));
  const more = el("button", { type: "button", class: "more", onclick: () => { isWhole = true; fill(); body.querySelector("th")?.focus(); } });

  function sortBy(i) {
    const first = !columns[i].isWord;
    order = { column: i, down: order.column === i ? !order.down : first };
    fill();
    document.getElementById("told").textContent = `sorted by ${columns[i].label}, ${order.down ? "descending" : "ascending"}`;
  }

  function fill() {
    const sorted = [...rows];
    if (order.column >= 0) {
      const value = columns[order.column].value;
      const isKnown = (row) => value(row) != null;
      // What is not known stands at the end, whichever way.
      sorted.sort((a, b) => isKnown(b) - isKnown(a) || (order.down ? d3.descending : d3.ascending)(value(a), value(b)));
    }
    header.querySelectorAll("th").forEach((th, i) => {
      if (i === order.column) th.setAttribute("aria-sort", order.down ? "descending" : "ascending");
      else th.removeAttribute("aria-sort");
    });
    const best = columns.map((c) => (c.best && rows.length > 1 ? d3[c.best](rows, c.value) : undefined));
    body.replaceChildren(...sorted.slice(0, isWhole ? undefined : limit).map((row) =>
      el("tr", { class: classOf(row) }, columns.map((column, i) => {
        const value = column.value(row);
        const text = column.text ? column.text(value, row) : value == null ? "–" : String(value);
        const content = column.node ? [column.node(row), " ", text] : [text];
        const names = [column.isWord ? "word" : "", value != null && value === best[i] ? "most" : ""].filter(Boolean).join(" ");
        return el(i === 0 ? "th" : "td", { class: names || null, scope: i === 0 ? "row" : null }, ...content);
      }))));
    more.textContent = isWhole ? "" : `Show all ${rows.length}`;
    more.hidden = isWhole;
  }

  fill();
  const table = el("table", {}, caption ? el("caption", {}, caption) : null, el("thead", {}, header), body);
  return el("div", {}, el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption ?? "table" }, table), more);
}

const headColumn = { label: "head", value: (row) => (row.head ?? row).name, node: (row) => swatch(row.head ?? row), isWord: true };

/** A table of one row per head and a column per group. */
const headsByGroup = (shown, groups, value, text) => ({
  rows: shown,
  columns: [headColumn, ...groups.map((group) => ({ label: group.label, value: (head) => value(head, group), text }))],
});
