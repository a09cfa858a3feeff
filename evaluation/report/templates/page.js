"use strict";
(() => {
  const valueOf = (cell) => {
    const traced = cell.querySelector("[data-value]");
    if (!traced) return cell.textContent.trim();
    const value = JSON.parse(traced.dataset.value);
    return value === null ? undefined : value;
  };
  const compare = (a, b) =>
    typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });

  for (const table of document.querySelectorAll("table.sort")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const button = head.querySelector("button");
      if (!button) return;
      button.addEventListener("click", () => {
        const falling = head.getAttribute("aria-sort") === "ascending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", falling ? "descending" : "ascending");
        const body = table.tBodies[0];
        const rows = [...body.rows].map((row, place) => ({ row, place, value: valueOf(row.cells[column]) }));
        rows.sort((a, b) => {
          if (a.value === undefined || b.value === undefined) {
            return (a.value === undefined) - (b.value === undefined) || a.place - b.place;
          }
          return (falling ? -1 : 1) * compare(a.value, b.value) || a.place - b.place;
        });
        body.append(...rows.map((entry) => entry.row));
      });
    });
  }

  const viewer = document.getElementById("viewer");
  const stage = viewer.querySelector(".stage");
  for (const button of document.querySelectorAll("button.enlarge")) {
    button.addEventListener("click", () => {
      const figure = button.closest("figure");
      const caption = figure.querySelector("figcaption");
      const drawing = button.querySelector("svg").cloneNode(true);
      stage.replaceChildren(drawing, caption.cloneNode(true));
      viewer.className = figure.classList.contains("picture") ? "picture" : "chart";
      viewer.showModal();
    });
  }
  viewer.querySelector(".close").addEventListener("click", () => viewer.close());
  viewer.addEventListener("click", (event) => { if (event.target === viewer) viewer.close(); });

  // where a number comes from, when it is pointed at
  document.addEventListener("pointerover", (event) => {
    const traced = event.target.closest && event.target.closest("[data-source]");
    if (traced && !traced.title) traced.title = `${traced.dataset.source}\n${traced.dataset.key}`;
  });

  // a printed page shows what is folded away on the screen
  const opened = [];
  window.addEventListener("beforeprint", () => {
    for (const part of document.querySelectorAll("details:not([open])")) { part.open = true; opened.push(part); }
  });
  window.addEventListener("afterprint", () => { for (const part of opened.splice(0)) part.open = false; });
})();
