"use strict";
// Tables of any length: only the rows in view are in the document. Columns and rows come as JSON beside each table.
for (const box of document.querySelectorAll(".rows")) {
  const { columns, values, words } = JSON.parse(document.getElementById(box.dataset.rows).textContent);
  const body = box.querySelector("tbody"), input = document.getElementById(box.dataset.filter);
  const count = document.getElementById(box.dataset.count), size = values[0].length;
  const height = 1.7 * parseFloat(getComputedStyle(document.documentElement).fontSize);
  const text = (column, row) => (columns[column].words ? words[values[column][row]] : values[column][row]);
  const lower = columns.map((column, at) => column.number ? null : column.words ? words.map((word) => word.toLowerCase())
    : values[at].map((word) => word.toLowerCase()));
  let order = Array.from({ length: size }, (_, row) => row), sorted = null, down = false, drawn = "";

  const holds = (word) => {
    const match = /^(\w+)(<=|>=|<|>|=)(-?[\d.]+(?:e-?\d+)?)$/.exec(word);
    const at = match ? columns.findIndex((column) => column.number && column.key === match[1]) : -1;
    if (at >= 0) {
      const bound = Number(match[3]), test = { "<": (x) => x < bound, ">": (x) => x > bound, "<=": (x) => x <= bound,
        ">=": (x) => x >= bound, "=": (x) => x === bound }[match[2]];
      return (row) => values[at][row] !== null && test(values[at][row]);
    }
    return (row) => lower.some((column, at) => column && column[columns[at].words ? values[at][row] : row].includes(word));
  };
  const compare = (at) => (a, b) => {
    const x = values[at][a], y = values[at][b];
    if (x === y) return a - b;
    if (x === null) return 1;
    if (y === null) return -1;
    const less = columns[at].number ? x < y : columns[at].words ? words[x] < words[y] : a < b;
    return less !== down ? -1 : 1;
  };
  const cell = (at, row) => {
    const found = document.createElement("td"), value = text(at, row), column = columns[at];
    if (!at) found.title = value;
    found.className = column.number ? "number" : at ? "" : "name";
    found.textContent = value === null ? "" : !column.number ? value : column.percent ? percent(value)
      : column.digits === undefined ? value.toLocaleString("en") : column.fixed ? value.toFixed(column.digits)
      : String(Number(value.toPrecision(column.digits)));
    return found;
  };
  const percent = (value) => value === 0 ? "0" : value < 1e-4 ? value.toExponential(1) : (100 * value).toFixed(2) + "%";
  const gap = (rows) => {
    const row = document.createElement("tr"), space = document.createElement("td");
    row.setAttribute("aria-hidden", "true");
    space.colSpan = columns.length;
    space.style.cssText = `height:${rows * height}px;padding:0;border:0`;
    row.append(space);
    return row;
  };
  const draw = () => {
    const first = Math.max(0, Math.min(Math.floor(box.scrollTop / height) - 20, order.length - 80));
    const last = Math.min(order.length, first + Math.ceil(box.clientHeight / height) + 60);
    const state = `${first} ${last}`;
    if (state === drawn) return;
    drawn = state;
    const rows = order.slice(first, last).map((row, i) => {
      const line = document.createElement("tr");
      line.setAttribute("aria-rowindex", first + i + 2);
      line.append(...columns.map((_, at) => cell(at, row)));
      return line;
    });
    body.replaceChildren(...(first ? [gap(first)] : []), ...rows, ...(last < order.length ? [gap(order.length - last)] : []));
  };
  const refresh = () => {
    const tests = input.value.trim().toLowerCase().split(/\s+/).filter(Boolean).map(holds);
    order = [];
    for (let row = 0; row < size; row++) if (tests.every((test) => test(row))) order.push(row);
    if (sorted !== null) order.sort(compare(sorted));
    count.textContent = `${order.length.toLocaleString("en")} of ${size.toLocaleString("en")}`;
    box.scrollTop = 0;
    drawn = "";
    draw();
  };
  box.querySelectorAll("thead button").forEach((button, at) => button.addEventListener("click", () => {
    down = sorted === at ? !down : Boolean(columns[at].down);
    sorted = at;
    box.querySelectorAll("th").forEach((head, i) => head.setAttribute("aria-sort",
      i !== at ? "none" : down ? "descending" : "ascending"));
    refresh();
  }));
  box.addEventListener("scroll", () => requestAnimationFrame(draw));
  addEventListener("resize", draw);
  addEventListener("beforeprint", () => { drawn = ""; draw(); });
  input.addEventListener("input", refresh);
  refresh();
}
