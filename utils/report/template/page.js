"use strict";
const all = (selector, root = document) => [...root.querySelectorAll(selector)];

for (const table of all("table.sortable")) {
  const heads = all("th", table);
  heads.forEach((head, column) => head.firstChild.addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") === "descending" || (column === 0 && head.getAttribute("aria-sort") === "none");
    heads.forEach(other => other.setAttribute("aria-sort", other === head ? (up ? "ascending" : "descending") : "none"));
    const value = row => row.cells[column].dataset.value;
    const compare = (a, b) => value(a) - value(b) || value(a).localeCompare(value(b));
    table.tBodies[0].append(...all("tbody tr", table).sort((a, b) => (up ? 1 : -1) * compare(a, b)));
  }));
}

const cut = (compare, value) => compare.style.setProperty("--cut", value + "%");

for (const section of all(".pairs")) {
  const cards = section.querySelector(".cards"), articles = all("article", cards), tools = section.querySelector("form");
  tools.addEventListener("submit", event => event.preventDefault());
  tools.words.addEventListener("input", () => {
    const words = tools.words.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const article of articles) {
      const text = all("li", article).map(item => item.textContent.toLowerCase()).join("\n");
      article.hidden = !words.every(word => text.includes(word));
    }
    const left = articles.filter(article => !article.hidden).length;
    tools.querySelector("output").textContent = words.length ? `${left} of ${articles.length} pairs` : `${left} pairs`;
  });
  cards.addEventListener("input", event => cut(event.target.parentElement, event.target.value));
  if (!tools.order) continue;
  tools.order.addEventListener("change", () => {
    const key = tools.order.value, sign = key === "number" ? 1 : -1;
    cards.append(...articles.sort((a, b) => sign * (a.dataset[key] - b.dataset[key])));
  });
  tools.elements.all.addEventListener("input", () => {
    for (const slider of all("input", cards)) {
      slider.value = 100 - tools.elements.all.value;
      cut(slider.parentElement, slider.value);
    }
  });
}

const data = document.getElementById("search-data");
if (data) {
  const search = JSON.parse(data.textContent), found = document.getElementById("found");
  const input = document.querySelector("#search input");
  const make = (tag, properties, ...children) => {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  };
  const list = ({ first, rank }, own) => make("ol", { className: "ranked" }, ...first.map((picture, i) => {
    const right = picture === own, alt = search.captions[picture] + (right ? " (the right picture)" : "");
    const image = make("img", { src: search.pictures[picture], width: 112, height: 112, alt });
    return make("li", { className: right ? "right" : "" }, image, `${i + 1}${right ? " ✓" : ""}`);
  }));
  const show = () => {
    const own = search.captions.indexOf(input.value.trim());
    if (own < 0) return;
    found.replaceChildren(...[["set", "Trained on the pairs"], ["expert", "Expert"]].flatMap(([key, name]) => [
      make("h3", {}, name, make("small", {}, `the right picture ranks ${search[key][own].rank} of ${search.pictures.length}`)),
      list(search[key][own], own),
    ]));
  };
  input.form.addEventListener("submit", event => event.preventDefault());
  input.addEventListener("input", show);
  input.addEventListener("focus", () => input.select());
  show();
}
