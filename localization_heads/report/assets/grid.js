// The heat map: layers by heads, coloured and sorted by any statistic, for pointer and keys.

const STATISTICS = [
  { key: "frequency", name: "selection frequency", text: (value) => percent(value, 0) },
  { key: "sum", name: "attention sum", text: (value) => reduced(value, 2) },
  { key: "entropy", name: "spatial entropy (low: one compact spot)", text: (value) => reduced(value, 2) },
  { key: "bottom", name: "bottom-row focus (share of samples)", text: (value) => percent(value, 0) },
  { key: "iou", name: "mean IoU", text: (value) => reduced(value, 2) },
];
const ORDERS = [
  ["place", "by layer and head"],
  ["layer", "each layer by value"],
  ["all", "all heads by value"],
];

function headGrid() {
  const { layers, heads, excluded, rows } = data.heads;
  const state = { statistic: null, order: "place", cells: [], width: 0 };
  const chart = document.getElementById("grid-chart"), readout = document.getElementById("grid-readout");
  const known = STATISTICS.filter(({ key }) => rows.some((row) => row[key] !== null));
  state.statistic = known[0];

  const valueOf = (row) =>
    state.statistic.key === "frequency" && row.layer < excluded ? null : row[state.statistic.key];

  // Where each head stands: [column, line], lines from the bottom as in the paper, or from the top when all are sorted.
  function places() {
    const descending = (a, b) => (valueOf(b) ?? -1) - (valueOf(a) ?? -1);
    if (state.order === "all")
      return [...rows].sort(descending).map((row, i) => ({ row, column: i % heads, line: Math.floor(i / heads) }));
    return Array.from({ length: layers }, (_, layer) => {
      const mine = rows.filter((row) => row.layer === layer).sort((a, b) => a.head - b.head);
      if (state.order === "layer") mine.sort(descending);
      return mine.map((row, i) => ({ row, column: state.order === "layer" ? i : row.head, line: layers - 1 - layer }));
    }).flat();
  }

  function paint() {
    const left = 38, labels = 44;
    const side = Math.min(58, Math.max(8, (state.width - left - 4) / heads));
    const width = Math.max(left + side * heads + 4, 260), height = side * layers + labels;
    const top = Math.max(...rows.map((row) => valueOf(row) ?? 0)) || 1;
    const svg = draw("svg", {
      viewBox: `0 -3 ${width} ${height + 3}`, width, height: height + 3, role: "grid", tabindex: "0",
      "aria-label": `${state.statistic.name} of ${layers} layers of ${heads} heads; arrow keys go from head to head`,
      "aria-rowcount": layers, "aria-colcount": heads,
    });
    state.cells = places().map((place) => cell(place, left, side, top));
    svg.append(draw("g", { "aria-hidden": "true" }, ...blanks(left, side)));
    const lines = new Map();
    for (const one of state.cells) {
      if (!lines.has(one.line)) lines.set(one.line, svg.appendChild(draw("g", { role: "row" })));
      lines.get(one.line).append(one.shape);
    }
    svg.append(...axisNames(left, side), ...frames(), draw("g", { id: "grid-cursor" }));
    chart.replaceChildren(svg, scale(top, Math.min(width - left, 260), left));
    svg.addEventListener("pointermove", point);
    svg.addEventListener("pointerdown", point);
    svg.addEventListener("pointerleave", hideTip);
    svg.addEventListener("keydown", walk);
    svg.addEventListener("focus", () => { if (!current) lookAt(rows[0]); });
    follow(current);
  }

  function cell({ row, column, line }, left, side, top) {
    const value = valueOf(row), x = left + column * side, y = line * side;
    const shape = draw("rect", {
      x, y, width: side, height: side, role: "gridcell", id: `cell-${row.layer}-${row.head}`,
      class: value === null ? "cell empty" : "cell",
      "aria-label": `${headName(row)}: ${value === null ? "no value" : state.statistic.text(value)}`,
    });
    if (value !== null) shape.setAttribute("fill", viridisText(value / top));
    shape.row = row;
    return { row, column, line, x, y, side, shape };
  }

  // Under the heads: those of which nothing is known (a heads.json lists the heads that were kept) leave a blank.
  function blanks(left, side) {
    if (state.order === "all") return [];
    return Array.from({ length: layers * heads }, (_, i) => draw("rect", {
      class: "cell empty", x: left + (i % heads) * side, y: Math.floor(i / heads) * side, width: side, height: side,
    }));
  }

  function frames() {
    return state.cells.filter(({ row }) => isUsed(row)).map(({ x, y, side }) =>
      draw("rect", { class: "used-frame", x: x + 1, y: y + 1, width: side - 2, height: side - 2 }));
  }

  function axisNames(left, side) {
    const every = (count) => [1, 2, 4, 5, 8, 10, 16, 20].find((n) => n * side >= 24 && count / n <= 16) || 20;
    const text = (x, y, anchor, name) => draw("text", { x, y, "text-anchor": anchor }, name);
    const bottom = side * layers, parts = [];
    const columns = { place: "head", layer: "place in its layer", all: "from the highest to the lowest, line by line" };
    parts.push(text(left + (side * heads) / 2, bottom + 34, "middle", columns[state.order]));
    if (state.order === "all") return parts;
    for (let i = 0; i < heads; i += every(heads))
      parts.push(text(left + (i + 0.5) * side, bottom + 15, "middle", state.order === "place" ? i : i + 1));
    for (let i = 0; i < layers; i += every(layers))
      parts.push(text(left - 7, bottom - (i + 0.5) * side + 4, "end", i));
    parts.push(draw("text", { transform: `translate(11 ${bottom / 2}) rotate(-90)`, "text-anchor": "middle" }, "layer"));
    return parts;
  }

  function scale(top, width, left) {
    const stops = VIRIDIS.map((_, i) => draw("stop", { offset: i / 16, "stop-color": viridisText(i / 16) }));
    return draw("svg", { width: left + Math.max(width, 240), height: 46, "aria-hidden": "true" },
      draw("defs", {}, draw("linearGradient", { id: "viridis" }, ...stops)),
      draw("rect", { x: left, y: 0, width, height: 10, fill: "url(#viridis)", rx: 2 }),
      draw("text", { x: left, y: 25 }, "0"),
      draw("text", { x: left, y: 41 }, state.statistic.name), // paper shows no chooser
      draw("text", { x: left + width, y: 25, "text-anchor": "end" }, state.statistic.text(top)));
  }

  function point(event) {
    const row = event.target.row;
    if (!row) return hideTip();
    lookAt(row);
    if (event.pointerType === "mouse") showTip(row, event.clientX, event.clientY);
  }

  function walk(event) {
    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1], Home: [-heads, 0], End: [heads, 0] };
    const move = steps[event.key], at = state.cells.find(({ row }) => row === current);
    if (!move) return;
    event.preventDefault();
    if (!at) return lookAt(rows[0]);
    const line = state.cells.filter((one) => one.line === at.line + move[1]);
    const column = at.column + move[0];
    const next = line.sort((a, b) => Math.abs(a.column - column) - Math.abs(b.column - column))[0];
    if (next) lookAt(next.row);
  }

  function follow(row) {
    const svg = chart.firstElementChild, at = state.cells.find((one) => one.row === row);
    if (!svg || !at) return;
    const frame = { x: at.x + 0.5, y: at.y + 0.5, width: at.side - 1, height: at.side - 1 };
    svg.querySelector("#grid-cursor").replaceChildren(
      draw("rect", { class: "cursor-rim", ...frame }), draw("rect", { class: "cursor", ...frame }));
    svg.setAttribute("aria-activedescendant", at.shape.id);
    readout.replaceChildren(make("strong", {}, headName(row)), ` ${[headStanding(row), ...headFacts(row)].join(" · ")}`);
  }

  readout.textContent = "Point at a head, or walk over them with the arrow keys.";
  const statistics = known.map(({ key, name }) => [key, name]);
  document.getElementById("grid-controls").append(
    chooser("Colour", statistics, (key) => { state.statistic = known.find((one) => one.key === key); paint(); }),
    chooser("Sort", ORDERS, (order) => { state.order = order; paint(); }));
  watchers.push(follow);
  fit(chart, (width) => { state.width = width; paint(); });
}

if (data.heads) headGrid();
