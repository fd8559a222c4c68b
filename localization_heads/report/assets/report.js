// Sorting of the ranking table; sorting, filtering and the maps of the gallery.

function chooser(name, choices, onChange) {
  const select = make("select", {}, ...choices.map(([value, text]) => make("option", { value }, text)));
  select.addEventListener("change", () => onChange(select.value));
  return make("label", {}, name, select);
}

// The ranking table can be sorted by any column, and shows only its first rows at first.

function rankingTable(table) {
  const body = table.tBodies[0], first = Number(table.dataset.first);
  const rows = [...body.rows], ascending = new Set(["rank", "head", "entropy", "bottom"]);
  let all = false;

  function order(list) {
    list.forEach((row, i) => row.classList.toggle("more", !all && i >= first));
    body.append(...list);
  }

  function sortBy(header, column) {
    const key = header.dataset.key;
    const current = header.getAttribute("aria-sort");
    const up = current ? current === "descending" : ascending.has(key);
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = (row) => row.cells[column].dataset.value;
    order([...body.rows].sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === undefined || y === undefined) return (x === undefined) - (y === undefined); // unknown values come last
      return up ? x - y : y - x;
    }));
  }

  [...table.tHead.rows[0].cells].forEach((header, column) => {
    const button = make("button", { type: "button" }, header.textContent);
    button.addEventListener("click", () => sortBy(header, column));
    header.replaceChildren(button);
  });
  table.tHead.rows[0].cells[0].setAttribute("aria-sort", "ascending");
  if (rows.length > first) {
    const button = make("button", { type: "button", class: "button" }, `Show all ${rows.length}`);
    button.addEventListener("click", () => { all = !all; button.textContent = all ? `Show the first ${first}` : `Show all ${rows.length}`; order([...body.rows]); });
    table.parentElement.after(button);
  }
  order(rows);
}

// The gallery can be sorted and filtered. The maps of a sample are drawn when it comes near the screen.

function gallery(host) {
  const cards = [...host.children];
  const text = new Map(cards.map((card) => [card, card.querySelector("header").textContent.toLowerCase()]));
  const number = (card, key) => Number(card.dataset[key] ?? NaN);
  const orders = [["number", "as in the data set"]];
  for (const [key, name] of [["iou", "IoU"], ["score", "score"]]) {
    if (!cards.some((card) => key in card.dataset)) continue;
    orders.push([`${key} up`, `worst first: lowest ${name}`], [`${key} down`, `best first: highest ${name}`]);
  }
  const count = make("span", { class: "count", role: "status" });
  const filter = make("input", { type: "search", placeholder: "words or an id", autocomplete: "off" });

  function sort(choice) {
    const [key, direction] = choice.split(" ");
    const sign = direction === "down" ? -1 : 1;
    const rank = (card) => (Number.isNaN(number(card, key)) ? Infinity : sign * number(card, key));
    // Unknown values come last: Infinity - Infinity is NaN, so those samples keep the order of the data set.
    host.append(...[...cards].sort((a, b) => rank(a) - rank(b) || number(a, "number") - number(b, "number")));
  }

  function applyFilter() {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const card of cards) card.hidden = !words.every((word) => text.get(card).includes(word));
    const shown = cards.filter((card) => !card.hidden).length;
    count.textContent = shown === cards.length ? `${cards.length} samples` : `${shown} of ${cards.length} samples`;
  }

  filter.addEventListener("input", applyFilter);
  document.getElementById("gallery-controls").append(chooser("Order", orders, sort), make("label", {}, "Filter", filter), count);
  applyFilter();

  const observer = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) if (isIntersecting) { observer.unobserve(target); drawMaps(target); }
  }, { rootMargin: "600px" });
  cards.forEach((card) => observer.observe(card));
  addEventListener("beforeprint", () => cards.filter((card) => !card.hidden).forEach(drawMaps));
}

function drawMaps(card) {
  const container = card.querySelector(".maps");
  if (container.childElementCount) return;
  const id = card.dataset.number, { maps, region } = data.cards[id];
  const large = card.querySelector(".large .picture"), layer = large.querySelector(".map");
  const [, , W, H] = large.getAttribute("viewBox").split(" ").map(Number);

  const overlay = (map) => {
    const [x0, y0, x1, y1] = region;
    const cells = draw("image", {
      class: "pixels", x: x0, y: y0, width: x1 - x0, height: y1 - y0, preserveAspectRatio: "none", href: mapUrl(map),
    });
    return draw("svg", { width: W, height: H, viewBox: `0 0 ${W} ${H}` }, cells); // clips the map to the image
  };

  const button = (map) => {
    const small = draw("svg", { class: "picture", viewBox: `0 0 ${W} ${H}`, "aria-hidden": "true" },
      draw("use", { href: `#image-${id}` }), overlay(map));
    if (map.name === "combined") small.append(large.querySelector(".shapes").cloneNode(true));
    const toggle = make("button", { type: "button", "aria-pressed": "false", title: `Lay the map of ${map.name} over the image` },
      small, make("span", {}, map.name));
    toggle.addEventListener("click", () => {
      const on = toggle.getAttribute("aria-pressed") === "false";
      for (const other of container.children) other.setAttribute("aria-pressed", "false");
      toggle.setAttribute("aria-pressed", String(on));
      layer.replaceChildren(...(on ? [overlay(map)] : []));
    });
    return toggle;
  };
  container.append(...maps.map(button));
}

document.documentElement.classList.add("js");
for (const [id, start] of [["ranking", rankingTable], ["gallery", gallery]]) {
  const host = document.getElementById(id);
  if (host) start(host);
}
