// The words form a group of radio buttons: Tab enters it; the arrow keys, Home and End move between words.

const words = [...document.querySelectorAll("#words .word")];
const heads = [...document.querySelectorAll("#heads .head")];
const buttons = heads.filter((head) => head.tagName === "BUTTON");
const bars = heads.filter((head) => head.querySelector(".bar"));
let word = 0, map = 0; // indices of the chosen word, and of the map shown for it

function overlay(map) {
  const [W, H] = data.size, [x0, y0, x1, y1] = data.region;
  return draw("svg", { width: W, height: H, viewBox: `0 0 ${W} ${H}` }, draw("image", { // clips the map to the image
    class: "pixels", x: x0, y: y0, width: x1 - x0, height: y1 - y0, preserveAspectRatio: "none", href: mapUrl(map),
  }));
}

function outline([x0, y0, x1, y1]) {
  const place = { x: x0, y: y0, width: x1 - x0, height: y1 - y0 };
  return ["rim", "line"].map((part) => draw("rect", { class: `${part} predicted`, ...place }));
}

function show() {
  const part = data.parts[word], ofOneHead = map > 0;
  document.getElementById("map").replaceChildren(overlay(part.maps[map]));
  document.getElementById("shapes").replaceChildren(...(part.box && !ofOneHead ? outline(part.box) : []));
  const who = ofOneHead ? buttons[map].firstElementChild.textContent : "all heads together";
  const where = part.box
    ? `box ${part.box.map(Math.round).join(" ")}, which holds ${Math.round(100 * part.score)} % of the map`
    : "no part of the image stands out";
  document.getElementById("said").textContent = `“${words[word].textContent}”: map of ${who}${ofOneHead ? "" : `; ${where}`}`;
  bars.forEach((bar, i) => {
    const mass = part.masses[i];
    bar.querySelector(".bar-value").setAttribute("width", 100 * Math.min(mass, 1));
    bar.querySelector(".figure").textContent = mass.toFixed(3);
  });
  words.forEach((button, i) => {
    button.setAttribute("aria-checked", String(i === word));
    button.tabIndex = i === word ? 0 : -1;
  });
  buttons.forEach((button, i) => button.setAttribute("aria-pressed", String(i === map)));
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
  word = Math.min(Math.max(number, 0), words.length - 1);
  show();
  if (focus) words[word].focus();
}

const KEYS = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -Infinity, End: Infinity };

words.forEach((button, i) => {
  const largest = Math.max(...data.parts.map((part) => Math.max(...part.masses)), 1e-9);
  const meter = draw("svg", { class: "meter", viewBox: "0 0 100 4", preserveAspectRatio: "none", "aria-hidden": "true" },
    draw("rect", { class: "bar-rail", width: 100, height: 4 }),
    draw("rect", { class: "bar-value", width: (100 * Math.max(...data.parts[i].masses)) / largest, height: 4 }));
  button.append(meter);
  button.addEventListener("click", () => choose(i, true));
  button.addEventListener("keydown", (event) => {
    if (!(event.key in KEYS) || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    choose(i + KEYS[event.key], true);
  });
});
buttons.forEach((button, i) => button.addEventListener("click", () => { map = i; show(); }));
document.documentElement.classList.add("js");
if (words.length) choose(words.length > 1 ? 1 : 0, false);
