"use strict";
// What the other scripts share: the data, making elements, the head that is looked at, the tip.
// Text of strangers goes through textContent and setAttribute alone, never through markup.

const SVG = "http://www.w3.org/2000/svg";
const data = JSON.parse(document.getElementById("data").textContent);
const reduced = (value, digits) => (value === null ? "–" : value.toFixed(digits));
const percent = (value, digits = 1) => (value === null ? "–" : `${(100 * value).toFixed(digits)} %`);

function make(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

function draw(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function chooser(name, choices, onChange) {
  const select = make("select", {}, ...choices.map(([value, text]) => make("option", { value }, text)));
  select.addEventListener("change", () => onChange(select.value));
  return make("label", {}, name, select);
}

const headName = (row) => `L${row.layer}H${row.head}`;
const isUsed = (row) => data.heads.used.some(([layer, head]) => layer === row.layer && head === row.head);

// --- the head that is looked at: one for the whole page ---
let current = null;
const watchers = [];

function lookAt(row) {
  if (row === current) return;
  current = row;
  for (const watcher of watchers) watcher(row);
}

function headFacts(row) {
  const facts = [`selection frequency ${(100 * row.frequency).toFixed(1)} ± ${percent(row.deviation)}`];
  facts.push(`attention sum ${reduced(row.sum, 3)}`, `spatial entropy ${reduced(row.entropy, 3)}`);
  if (row.bottom !== null) facts.push(`bottom row ${percent(row.bottom, 0)}`);
  if (row.iou !== null) facts.push(`mean IoU ${reduced(row.iou, 3)}`);
  return facts;
}

function headStanding(row) {
  if (row.layer < data.heads.excluded) return "its layer is left out";
  if (!row.kept) return "not kept by criterion 1";
  return isUsed(row) ? `rank ${row.rank}, makes the boxes` : `rank ${row.rank}`;
}

// --- the tip beside the pointer; what it says is said elsewhere too, for those who do not see it ---
const tip = document.getElementById("tip");

function showTip(row, x, y) {
  const lines = [headStanding(row), ...headFacts(row)].map((text) => make("div", {}, text));
  tip.replaceChildren(make("strong", {}, headName(row)), ...lines);
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const left = x + 16 + width > innerWidth ? x - width - 16 : x + 16;
  tip.style.left = `${Math.max(4, left)}px`;
  tip.style.top = `${Math.max(4, Math.min(y + 16, innerHeight - height - 4))}px`;
}

function hideTip() {
  tip.hidden = true;
}

// Draw for the width that there is, and again when it changes.
function fit(host, paint) {
  let width = 0;
  new ResizeObserver(() => {
    const next = Math.floor(host.clientWidth);
    if (next && next !== width) paint((width = next));
  }).observe(host);
}

document.documentElement.classList.add("js");
