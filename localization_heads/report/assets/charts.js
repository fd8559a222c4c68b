// Points on two axes: the curve of attention sums and the scatter of frequency and IoU.

const HEIGHT = 290;
const EDGE = { left: 58, right: 24, top: 12, bottom: 40 };

function niceSteps({ low, top }) {
  const raw = (top - low) / 4;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((size) => size >= raw * 0.999);
  const first = Math.ceil(low / step - 1e-6), last = Math.floor(top / step + 1e-6);
  return Array.from({ length: last - first + 1 }, (_, i) => (first + i) * step);
}

// The ends of an axis of shares: the values with some room around them; from 0 where they come near it.
function ends(values) {
  const low = Math.min(...values, 1), high = Math.max(...values, 0);
  if (!values.length) return { low: 0, top: 1 };
  const room = Math.max(0.08 * (high - low), 0.02);
  return { low: low < (high - low) / 2 ? 0 : Math.max(0, low - room), top: Math.min(1, high + room) };
}

// chart: { host, label, points: [{ x, y, row }], x: axis, y: axis, threshold }; an axis: { name, low, top, text }
function plotPoints(chart) {
  fit(chart.host, (width) => paintPoints(chart, width));
}

function paintPoints(chart, width) {
  const right = width - EDGE.right, bottom = HEIGHT - EDGE.bottom;
  const share = (axis, value) => (value - axis.low) / (axis.top - axis.low);
  const toX = (x) => EDGE.left + share(chart.x, x) * (right - EDGE.left);
  const toY = (y) => bottom - share(chart.y, y) * (bottom - EDGE.top);
  const svg = draw("svg", {
    viewBox: `0 0 ${width} ${HEIGHT}`, width: "100%", role: "img", tabindex: "0", "aria-label": chart.label,
  });
  svg.append(...axes(chart, toX, toY, right, bottom));
  if (chart.threshold !== null) svg.append(...threshold(chart.threshold, toY, right));
  const marks = chart.points.map((point) => mark(point, toX(point.x), toY(point.y), width));
  const used = marks.filter((one) => one.isUsed);
  svg.append(...marks.filter((one) => !one.isUsed).map((one) => one.shape));
  svg.append(...used.flatMap((one) => one.label), ...used.map((one) => one.shape));
  dodge(used, EDGE.top + 6, bottom - 6);
  chart.host.replaceChildren(svg);
  respond(svg, marks, width);
}

function axes(chart, toX, toY, right, bottom) {
  const parts = [draw("path", { class: "axis", d: `M${EDGE.left} ${EDGE.top}V${bottom}H${right}` })];
  for (const value of niceSteps(chart.y)) {
    const y = toY(value);
    parts.push(draw("path", { class: "axis", d: `M${EDGE.left} ${y}H${right}`, "stroke-opacity": 0.6 }));
    parts.push(draw("text", { x: EDGE.left - 7, y: y + 4, "text-anchor": "end" }, chart.y.text(value)));
  }
  for (const value of niceSteps(chart.x)) {
    parts.push(draw("text", { x: toX(value), y: bottom + 17, "text-anchor": "middle" }, chart.x.text(value)));
  }
  const middle = (EDGE.left + right) / 2;
  parts.push(draw("text", { x: middle, y: HEIGHT - 5, "text-anchor": "middle" }, chart.x.name));
  const side = { x: 0, y: 0, transform: `translate(12 ${(EDGE.top + bottom) / 2}) rotate(-90)`, "text-anchor": "middle" };
  parts.push(draw("text", side, chart.y.name));
  return parts;
}

function threshold(value, toY, right) {
  const y = toY(value);
  const name = { x: right, y: y + 16, "text-anchor": "end", class: "threshold-name halo" };
  return [
    draw("path", { class: "threshold", d: `M${EDGE.left} ${y}H${right}` }),
    draw("text", name, `τ = ${value.toFixed(3)}`),
  ];
}

function mark(point, x, y, width) {
  const used = isUsed(point.row);
  const kind = `mark ${used ? "used" : point.row.kept ? "kept" : ""}`;
  const shape = used
    ? draw("path", { class: kind, d: `M${x} ${y - 7}L${x + 7} ${y}L${x} ${y + 7}L${x - 7} ${y}Z` })
    : draw("circle", { class: kind, cx: x, cy: y, r: 3.6 });
  const leftwards = x + 66 > width;
  const text = draw("text", { class: "strong halo", "text-anchor": leftwards ? "end" : "start" }, headName(point.row));
  return { x, y, row: point.row, shape, kind, isUsed: used, leftwards, label: [draw("path", { class: "leader" }), text] };
}

// Names of neighbours stand one below the other; a line leads from a name to its mark.
function dodge(marks, top, bottom) {
  const ordered = [...marks].sort((a, b) => a.y - b.y);
  let last = top - 15;
  ordered.forEach((one, i) => {
    const rest = 15 * (ordered.length - 1 - i);
    const y = Math.max(last + 15, Math.min(one.y, bottom - rest));
    last = y;
    const x = one.x + (one.leftwards ? -26 : 26);
    const [leader, text] = one.label;
    leader.setAttribute("d", `M${one.x} ${one.y}L${x + (one.leftwards ? 2 : -2)} ${y}`);
    text.setAttribute("x", x);
    text.setAttribute("y", y + 4);
  });
}

function respond(svg, marks, width) {
  const show = (row) => marks.forEach((one) => one.shape.classList.toggle("current", one.row === row));
  show(current);
  svg.report = show; // the newest drawing is the one that follows
  svg.addEventListener("pointermove", (event) => {
    const frame = svg.getBoundingClientRect(), scale = width / frame.width;
    const x = (event.clientX - frame.left) * scale, y = (event.clientY - frame.top) * scale;
    const near = nearest(marks, x, y);
    if (!near) return hideTip();
    lookAt(near.row);
    showTip(near.row, event.clientX, event.clientY);
  });
  svg.addEventListener("pointerleave", hideTip);
  svg.addEventListener("blur", hideTip);
  svg.addEventListener("keydown", (event) => step(event, svg, marks, width));
}

function nearest(marks, x, y) {
  let best = null, least = 40;
  for (const one of marks) {
    const distance = Math.hypot(one.x - x, one.y - y);
    if (distance < least) [best, least] = [one, distance];
  }
  return best;
}

function step(event, svg, marks, width) {
  const steps = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 };
  if (event.key === "Escape") return hideTip();
  if (!(event.key in steps) || !marks.length) return;
  event.preventDefault();
  const ordered = [...marks].sort((a, b) => a.x - b.x || a.y - b.y);
  const at = ordered.findIndex((one) => one.row === current);
  const next = at < 0 ? ordered.length - 1 : Math.min(Math.max(at + steps[event.key], 0), ordered.length - 1);
  const one = ordered[next];
  const frame = svg.getBoundingClientRect(), scale = frame.width / width;
  lookAt(one.row);
  showTip(one.row, frame.left + one.x * scale, frame.top + one.y * scale);
}

function drawCharts() {
  const rows = data.heads.rows;
  const { excluded } = data.heads;
  const considered = rows.filter((row) => row.layer >= excluded).sort((a, b) => a.sum - b.sum);
  const kept = considered.filter((row) => row.kept).length;
  const charts = [{
    host: document.getElementById("curve-chart"),
    label: `Average attention sums of ${considered.length} heads in ascending order; ${kept} are kept. Arrow keys go from head to head.`,
    points: considered.map((row, i) => ({ x: i + 1, y: row.sum, row })),
    x: { name: `${excluded ? `heads of layers ${excluded} and up` : "heads"}, in ascending order`, low: 0, top: considered.length * 1.03 || 1, text: (value) => value.toFixed(0) },
    y: { name: "average attention sum", low: 0, top: axisTop([...considered.map((row) => row.sum), data.heads.tau || 0]), text: tick },
    threshold: data.heads.tau,
  }];
  const both = rows.filter((row) => row.iou !== null && row.frequency >= data.heads.leastFrequency);
  if (document.getElementById("scatter-chart")) charts.push({
    host: document.getElementById("scatter-chart"),
    label: `Selection frequency against mean IoU for ${both.length} heads. Arrow keys go from head to head.`,
    points: both.map((row) => ({ x: row.frequency, y: row.iou, row })),
    x: { name: "selection frequency", ...ends(both.map((row) => row.frequency)), text: (value) => `${tick(100 * value)} %` },
    y: { name: "mean IoU", ...ends(both.map((row) => row.iou)), text: tick },
    threshold: null,
  });
  charts.forEach(plotPoints);
  watchers.push((row) => charts.forEach((chart) => chart.host.firstElementChild?.report(row)));
}

const axisTop = (values) => 1.08 * Math.max(...values, 0) || 1;
const tick = (value) => String(Number(value.toPrecision(3)));

if (data.heads) drawCharts();
