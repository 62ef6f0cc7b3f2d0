"use strict";
// Tables that sort by a click on a column, show more rows and search; all cells are set as text.
function format(value, kind) {
  if (value === null) return "–";
  if (kind === "text") return value;
  if (kind === "count") return value.toLocaleString("en-US");
  const text = Math.abs(value).toFixed(2);
  const sign = text === "0.00" ? "" : value < 0 ? "−" : kind === "points" ? "+" : "";
  return sign + text;
}

function compare(a, b, kind, direction) {
  if (a === null || b === null) return (a === null) - (b === null); // what does not exist comes last
  return direction * (kind === "text" ? a.localeCompare(b) : a - b);
}

function setUp(box) {
  const { columns, rows, visible } = JSON.parse(box.querySelector("script").textContent);
  const body = box.querySelector("tbody"), more = box.querySelector(".more"), search = box.querySelector("input");
  const heads = [...box.querySelectorAll("th")];
  let order = rows, sorted = -1, direction = 1, all = false;

  function show() {
    const words = (search ? search.value : "").toLowerCase();
    const found = order.filter((row) => !words || row.some((x) => typeof x === "string" && x.toLowerCase().includes(words)));
    body.replaceChildren(...(all ? found : found.slice(0, visible)).map((row) => {
      const line = document.createElement("tr");
      row.forEach((value, i) => {
        const cell = line.insertCell();
        cell.className = columns[i][1];
        cell.textContent = format(value, columns[i][1]);
      });
      return line;
    }));
    more.hidden = found.length <= visible;
    more.textContent = all ? `show ${visible} rows` : `show all ${found.length} rows`;
  }

  heads.forEach((head, index) => head.querySelector("button").addEventListener("click", () => {
    const kind = columns[index][1];
    direction = sorted === index ? -direction : kind === "text" ? 1 : -1; // numbers: the largest first
    sorted = index;
    order = [...rows].sort((a, b) => compare(a[index], b[index], kind, direction));
    heads.forEach((other, i) => other.setAttribute("aria-sort", i !== index ? "none" : direction > 0 ? "ascending" : "descending"));
    show();
  }));
  more.addEventListener("click", () => { all = !all; show(); });
  if (search) search.addEventListener("input", show);
  show();
}

document.querySelectorAll("[data-table]").forEach(setUp);
