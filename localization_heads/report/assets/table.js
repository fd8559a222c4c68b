// The ranking table: sorted by any column, the first rows at first, a row lit with its head elsewhere.

function rankingTable(table) {
  const body = table.tBodies[0], first = Number(table.dataset.first);
  const rows = [...body.rows], ascending = new Set(["rank", "head", "entropy", "bottom"]);
  const byHead = new Map(data.heads.rows.map((row) => [`${row.layer}-${row.head}`, row]));
  let all = false;

  function order(list) {
    list.forEach((row, i) => row.classList.toggle("more", !all && i >= first));
    body.append(...list);
  }

  function sortBy(header, column) {
    const key = header.dataset.key;
    const was = header.getAttribute("aria-sort");
    const up = was ? was === "descending" : ascending.has(key);
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = (row) => row.cells[column].dataset.value;
    order([...body.rows].sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === undefined || y === undefined) return (x === undefined) - (y === undefined); // unknown comes last
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
  body.addEventListener("pointerover", (event) => {
    const row = event.target.closest("tr");
    if (row) lookAt(byHead.get(`${row.dataset.layer}-${row.dataset.head}`));
  });
  watchers.push((head) => {
    for (const row of rows)
      row.classList.toggle("current", row.dataset.layer === String(head.layer) && row.dataset.head === String(head.head));
  });
}

if (data.heads) rankingTable(document.getElementById("ranking"));
