"use strict";
// Filters, sorting, tooltips and the list of documents. All text enters the page as text, never as markup.
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const make = (name, className, text) => {
    const element = document.createElement(name);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const data = JSON.parse(document.getElementById("data").textContent);
  document.documentElement.classList.add("scripted");

  // Filters: a mark or row says whose it is (data-variant) and of which task (data-task).
  const off = new Set();
  const only = {};
  const hidden = element => {
    if (element.dataset.variant !== undefined && off.has(element.dataset.variant)) return true;
    return Object.entries(only).some(([key, value]) => value && element.dataset[key] !== undefined && element.dataset[key] !== value);
  };
  const apply = () => {
    for (const element of all("[data-variant], [data-task], [data-error]")) {
      if (!element.matches(".filter")) element.classList.toggle("off", hidden(element));
    }
    all("svg:has(.front)").forEach(drawFront);
    listDocuments();
  };

  // The Pareto front of the points that are shown: nothing further along both axes.
  const drawFront = svg => {
    const path = svg.querySelector(".front");
    const sense = Number(path.dataset.across);
    const points = all(".mark:not(.off)", svg).map(mark => ({ x: Number(mark.dataset.x), y: Number(mark.dataset.y) }));
    points.sort((a, b) => sense * (b.x - a.x) || a.y - b.y);
    const front = [];
    for (const point of points) if (!front.length || point.y < front[front.length - 1].y) front.push(point);
    path.setAttribute("d", front.map((p, i) => (i ? `H${p.x}V${p.y}` : `M${p.x} ${p.y}`)).join(""));
  };

  for (const box of all("input.filter")) {
    if (!box.checked) off.add(box.dataset.variant);  // as a browser restores it on a reload
    box.addEventListener("change", () => {
      if (box.checked) off.delete(box.dataset.variant);
      else off.add(box.dataset.variant);
      apply();
    });
  }
  for (const select of all("select.filter")) {
    only[select.dataset.key] = select.value;
    select.addEventListener("change", () => {
      only[select.dataset.key] = select.value;
      apply();
    });
  }

  // Sorting: a heading of table.sortable sorts by the cells' data-value, or by their text.
  const value = (row, index) => {
    const cell = row.cells[index];
    const raw = cell?.dataset.value ?? cell?.textContent.trim() ?? "";
    const number = Number(raw);
    return raw === "" || Number.isNaN(number) ? raw : number;
  };
  const compare = (a, b) => {
    if (typeof a === "number" && typeof b === "number") return a - b;
    if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
    return a.localeCompare(b);
  };
  for (const table of all("table.sortable")) {
    all("thead th", table).forEach((heading, index) => {
      const button = make("button", "sort");
      button.type = "button";
      button.append(...heading.childNodes);
      heading.append(button);
      button.addEventListener("click", () => {
        const order = heading.getAttribute("aria-sort") === "ascending" ? -1 : 1;
        all("thead th", table).forEach(other => other.removeAttribute("aria-sort"));
        heading.setAttribute("aria-sort", order > 0 ? "ascending" : "descending");
        for (const body of table.tBodies) {
          const rows = [...body.rows].sort((a, b) => order * compare(value(a, index), value(b, index)));
          body.append(...rows);
        }
      });
    });
  }

  // Tooltips: the <title> of a mark, shown at once, by mouse, touch or keyboard.
  const tip = make("div", "tip");
  tip.setAttribute("role", "tooltip");
  tip.hidden = true;
  document.body.append(tip);
  const show = (text, box) => {
    tip.textContent = text;
    tip.hidden = false;
    const width = tip.offsetWidth, height = tip.offsetHeight, room = document.documentElement.clientWidth;
    const left = Math.min(Math.max(8, box.left + box.width / 2 - width / 2), Math.max(8, room - width - 8));
    const top = box.top > height + 12 ? box.top - height - 8 : box.bottom + 8;
    tip.style.left = `${left + scrollX}px`;
    tip.style.top = `${top + scrollY}px`;
  };
  const hide = () => { tip.hidden = true; };
  for (const mark of all("svg .mark, [data-tip]")) {
    const title = mark.querySelector("title");
    const text = title ? title.textContent : mark.dataset.tip;
    if (title) {
      mark.setAttribute("aria-label", text);
      title.remove();
    }
    for (const event of ["pointerenter", "focus"]) mark.addEventListener(event, () => show(text, mark.getBoundingClientRect()));
    for (const event of ["pointerleave", "blur"]) mark.addEventListener(event, hide);
  }
  addEventListener("keydown", event => { if (event.key === "Escape") hide(); });

  // Documents: those that the shown variants answered differently, a page at a time.
  const list = document.getElementById("documents-list");
  const disagree = document.getElementById("only-disagreements");
  const turned = document.getElementById("turned");
  const count = document.getElementById("documents-count");
  const more = document.getElementById("documents-more");
  let shown = 20;
  const marks = { true: ["✓", "right"], false: ["✕", "wrong"], null: ["·", "neither right nor wrong"] };
  const answerRow = ([variant, text, right, differs]) => {
    const row = make("tr", differs ? "differs" : "");
    const name = make("th", "", "");
    name.scope = "row";
    name.append(make("i", `swatch v${variant % 8}`), data.variants[variant]);
    const sign = make("td", right === true ? "good" : right === false ? "bad" : "dim", marks[right][0]);
    sign.setAttribute("aria-label", marks[right][1]);
    const cell = make("td");
    cell.append(make("pre", "answer", text));
    row.append(name, sign, cell);
    return row;
  };
  const article = (item, answers) => {
    const box = make("article", "document");
    box.dataset.task = item.task;
    box.append(make("h3", "", `${item.task} · document ${item.id}`), make("pre", "context", item.context));
    if (item.gold !== null) {
      const gold = make("p", "gold");
      gold.append(make("span", "dim", "Right answer "), make("code", "", item.gold));
      box.append(gold);
    }
    const table = make("table", "answers");
    const body = make("tbody");
    body.append(...answers.map(answerRow));
    table.append(body);
    box.append(table);
    return box;
  };
  const chosen = item => {
    if (only.task && item.task !== only.task) return null;
    const answers = item.answers.filter(([variant]) => !off.has(String(variant)));
    if (!answers.length) return null;
    const key = ([, text, right]) => `${right}|${text}`;
    if (disagree.checked && new Set(answers.map(key)).size < 2) return null;
    const before = answers.find(([variant]) => variant === 0);
    if (turned.value === "lost" && !(before?.[2] === true && answers.some(a => a[2] === false))) return null;
    if (turned.value === "gained" && !(before?.[2] === false && answers.some(a => a[2] === true))) return null;
    return [item, answers];
  };
  function listDocuments() {
    if (!list) return;
    const found = data.documents.map(chosen).filter(Boolean);
    list.replaceChildren(...found.slice(0, shown).map(([item, answers]) => article(item, answers)));
    count.textContent = `${Math.min(shown, found.length)} of ${found.length} shown`;
    more.hidden = found.length <= shown;
    all(".context", list).forEach(context => { context.scrollTop = context.scrollHeight; });
  }
  if (list) {
    for (const control of [disagree, turned]) control.addEventListener("change", listDocuments);
    more.addEventListener("click", () => { shown += 20; listDocuments(); });
  }
  apply();
})();
