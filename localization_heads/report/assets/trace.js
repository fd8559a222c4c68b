// Words are one group of radio buttons: Tab enters it, arrow keys, Home and End go from word to word.

const words = [...document.querySelectorAll("#words .word")];
const heads = [...document.querySelectorAll("#heads .head")];
const buttons = heads.filter((head) => head.tagName === "BUTTON");
const bars = heads.filter((head) => head.querySelector(".bar"));
let chosen = 0, layer = 0;

function overlay(map) {
  const [W, H] = data.size, [x0, y0, x1, y1] = data.region;
  return draw("svg", { width: W, height: H, viewBox: `0 0 ${W} ${H}` }, draw("image", { // cuts off what lies outside
    class: "pixels", x: x0, y: y0, width: x1 - x0, height: y1 - y0, preserveAspectRatio: "none", href: mapAddress(map),
  }));
}

function outline([x0, y0, x1, y1]) {
  const place = { x: x0, y: y0, width: x1 - x0, height: y1 - y0 };
  return ["rim", "line"].map((part) => draw("rect", { class: `${part} predicted`, ...place }));
}

function show() {
  const part = data.parts[chosen], own = layer > 0;
  document.getElementById("map").replaceChildren(overlay(part.maps[layer]));
  document.getElementById("shapes").replaceChildren(...(part.box && !own ? outline(part.box) : []));
  const who = own ? buttons[layer].firstElementChild.textContent : "all heads together";
  const where = part.box
    ? `box ${part.box.map(Math.round).join(" ")}, which holds ${Math.round(100 * part.score)} % of the map`
    : "no part of the image stands out";
  document.getElementById("said").textContent = `“${words[chosen].textContent}”: map of ${who}${own ? "" : `; ${where}`}`;
  bars.forEach((bar, i) => {
    const mass = part.masses[i];
    bar.querySelector(".bar-value").setAttribute("width", 100 * Math.min(mass, 1));
    bar.querySelector(".figure").textContent = mass.toFixed(3);
  });
  words.forEach((word, i) => {
    word.setAttribute("aria-checked", String(i === chosen));
    word.tabIndex = i === chosen ? 0 : -1;
  });
  buttons.forEach((button, i) => button.setAttribute("aria-pressed", String(i === layer)));
  if (part.grid) drawGrid(part.grid);
}

function drawGrid({ rows, columns, cells, top }) {
  const canvas = document.getElementById("grid"), bytes = atob(cells);
  canvas.width = columns;
  canvas.height = rows;
  const context = canvas.getContext("2d"), pixels = context.createImageData(columns, rows);
  for (let i = 0; i < bytes.length; i++) pixels.data.set([...viridis(bytes.charCodeAt(i) / 255), 255], 4 * i);
  context.putImageData(pixels, 0, 0);
  document.getElementById("grid-top").textContent = `the brightest is ${top}`;
}

function choose(number, focus) {
  chosen = Math.min(Math.max(number, 0), words.length - 1);
  show();
  if (focus) words[chosen].focus();
}

const KEYS = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -Infinity, End: Infinity };

words.forEach((word, i) => {
  const most = Math.max(...data.parts.map((part) => Math.max(...part.masses)), 1e-9);
  const meter = draw("svg", { class: "meter", viewBox: "0 0 100 4", preserveAspectRatio: "none", "aria-hidden": "true" },
    draw("rect", { class: "bar-rail", width: 100, height: 4 }),
    draw("rect", { class: "bar-value", width: (100 * Math.max(...data.parts[i].masses)) / most, height: 4 }));
  word.append(meter);
  word.addEventListener("click", () => choose(i, true));
  word.addEventListener("keydown", (event) => {
    if (!(event.key in KEYS) || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    choose(i + KEYS[event.key], true);
  });
});
buttons.forEach((button, i) => button.addEventListener("click", () => { layer = i; show(); }));
document.documentElement.classList.add("js");
if (words.length) choose(words.length > 1 ? 1 : 0, false);
