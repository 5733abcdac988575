"use strict";
// What the page does beside showing itself: choose protocol, axes and rows; sort; link points and lines; draw scatters.
//
// `data` is what evaluate/page.py wrote: axes and measures with their titles; rows {key: {family, sites, find}}; and
// panels, each with its points (x by axis, y and span by measure), baselines, seeds, fronts and ready-made scales.
// Visibility: an element with data-protocol, data-axis or data-sites shows when that is the choice; an element with
// data-row (or data-rows) is .gone while the filter hides its replacement.

const all = (query, within = document) => [...within.querySelectorAll(query)];
const byId = id => document.getElementById(id);
const data = JSON.parse(byId("data").textContent);
const state = {protocol: all("[data-tab]")[0].dataset.tab, axis: "l0", sites: "", words: "", off: new Set()};
document.body.classList.remove("still");

// --- choices of the whole page ---

function showChosen(everyProtocol = false) {
  for (const tab of all("[data-tab]")) tab.setAttribute("aria-pressed", tab.dataset.tab === state.protocol);
  for (const node of all("[data-protocol], [data-axis], [data-sites]")) {
    const {protocol, axis, sites} = node.dataset;
    node.hidden = (protocol !== undefined && protocol !== state.protocol && !everyProtocol)
      || (axis !== undefined && axis !== state.axis)
      || (sites !== undefined && state.sites !== "" && sites !== state.sites);
  }
}

function hides(key) {
  const row = data.rows[key];
  if (state.off.has(row.family)) return true;
  if (state.sites !== "" && row.sites !== state.sites) return true;
  return row.family !== "baseline" && !state.words.split(/\s+/).every(word => row.find.includes(word));
}

function filter(within = document) {
  const hidden = new Set(Object.keys(data.rows).filter(hides));
  for (const node of all("[data-row]", within)) node.classList.toggle("gone", hidden.has(node.dataset.row));
  for (const node of all("[data-rows]", within))
    node.classList.toggle("gone", node.dataset.rows.split(" ").some(key => hidden.has(key)));
  for (const node of all("[data-baseline]", within)) node.classList.toggle("gone", state.off.has("baseline"));
  for (const plot of all(".plot"))  // the front is of all replacements; it goes when none of its plot is left
    all(".front", plot)[0]?.classList.toggle("gone", !plot.querySelector(".mark:not(.gone)"));
  const rows = Object.keys(data.rows).filter(key => data.rows[key].family !== "baseline");
  const shown = rows.filter(key => !hidden.has(key)).length;
  byId("shown").textContent = shown === rows.length ? "" : `${shown} of ${rows.length} shown`;
}

for (const tab of all("[data-tab]"))
  tab.addEventListener("click", () => { state.protocol = tab.dataset.tab; showChosen(); });
byId("byaxis").addEventListener("change", event => {
  state.axis = event.target.value;
  showChosen();
  for (const plot of all(".plot")) draw(plot);
  starByAxis();
});
byId("bysites")?.addEventListener("change", event => { state.sites = event.target.value; showChosen(); filter(); });
byId("filter").addEventListener("input", event => { state.words = event.target.value.trim().toLowerCase(); filter(); });
for (const chip of all(".chip")) chip.addEventListener("click", () => {
  const on = chip.getAttribute("aria-pressed") !== "true";
  chip.setAttribute("aria-pressed", on);
  state.off[on ? "delete" : "add"](chip.dataset.family);
  filter();
});
for (const button of all("button.wide")) button.addEventListener("click", () => {
  const wide = button.getAttribute("aria-pressed") !== "true";
  for (const other of all("button.wide")) other.setAttribute("aria-pressed", wide);
  for (const table of all("table.results")) table.classList.toggle("wide", wide);
});
byId("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});

// --- tables ---

function starByAxis() {
  for (const cell of all("[data-axes]")) {
    const [text, value] = JSON.parse(cell.dataset.axes)[state.axis] ?? ["–", ""];
    cell.textContent = text;
    if (cell.dataset.value !== undefined) cell.dataset.value = value;
  }
  for (const name of all(".axisname")) name.textContent = data.axes[state.axis].short;
}

function sortBy(th) {
  const table = th.closest("table"), body = table.tBodies[0], column = [...th.parentNode.children].indexOf(th);
  const up = th.getAttribute("aria-sort") !== "ascending";
  for (const other of all("th", table)) other.removeAttribute("aria-sort");
  th.setAttribute("aria-sort", up ? "ascending" : "descending");
  const key = row => row.children[column].dataset.value ?? row.children[column].textContent.trim();
  const rows = all("tr", body).map((row, place) => ({row, place, base: row.classList.contains("baseline"), value: key(row)}));
  rows.sort((a, b) => {
    if (a.base !== b.base) return a.base ? 1 : -1;                            // baselines stay at the foot,
    if ((a.value === "") !== (b.value === "")) return a.value === "" ? 1 : -1;  // rows without a number below the others
    const x = Number(a.value), y = Number(b.value);
    const order = Number.isNaN(x) || Number.isNaN(y) ? a.value.localeCompare(b.value) : x - y;
    return (up ? order : -order) || a.place - b.place;
  });
  for (const {row} of rows) body.append(row);
}
for (const th of all("th.sorts")) {
  th.addEventListener("click", () => sortBy(th));
  th.addEventListener("keydown", event => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    sortBy(th);
  });
}

// --- scatter: draws what evaluate/svg.py draws, for the chosen axes ---

const WIDTH = 560, HEIGHT = 380, LEFT = 62, RIGHT = 18, TOP = 24, BOTTOM = 46, FLOOR = HEIGHT - BOTTOM, END = WIDTH - RIGHT;
const text = value => String(value).replace(/[&<>"']/g, sign => `&#${sign.charCodeAt(0)};`);
const tag = (x, y, name, anchor, value) =>
  `<text class="${name}" x="${x}" y="${y}" text-anchor="${anchor}">${text(value)}</text>`;

function share({low, high, log}, value) {
  return log ? Math.log(Math.max(value, low) / low) / Math.log(high / low) : (value - low) / (high - low);
}

function grid(x, y, px, py, xTitle, yTitle) {
  let out = "";
  for (const [value, name] of y.ticks) {
    out += `<path class="grid" d="M${LEFT},${py(value)}H${END}"/>` + tag(LEFT - 8, (+py(value) + 4).toFixed(1), "tick", "end", name);
  }
  for (const [value, name] of x.ticks)
    out += `<path class="grid" d="M${px(value)},${TOP}V${FLOOR}"/>` + tag(px(value), FLOOR + 17, "tick", "middle", name);
  out += `<path class="axis" d="M${LEFT},${FLOOR}H${END}"/>` + tag((LEFT + END) / 2, HEIGHT - 6, "title", "middle", xTitle);
  const half = (TOP + FLOOR) / 2;
  return out + `<text class="title" x="14" y="${half}" text-anchor="middle" transform="rotate(-90 14 ${half})">${text(yTitle)}</text>`;
}

function baselines({bars, above, below}, py) {
  let out = "";
  for (const [value, name] of bars)
    out += `<path class="bar" d="M${LEFT},${py(value)}H${END}"/>` + tag(END - 4, (py(value) - 5).toFixed(1), "barname", "end", name);
  if (above) out += tag(END - 4, TOP - 9, "barname", "end", `↑ ${above}`);
  if (below) out += tag(END - 4, FLOOR - 8, "barname", "end", `↓ ${below}`);
  return `<g data-baseline>${out}</g>`;
}

function step(points, px, py) {
  if (!points.length) return "";
  const [[x0, y0], ...rest] = points.sort(([a, b], [c, d]) => a - c || b - d);
  const path = rest.map(([x, y]) => `H${px(x)}V${py(y)}`).join("");
  return `<path class="front" d="M${px(x0)},${py(y0)}${path}H${END + 8}"/>`;
}

function scatter(panel, axis, measure, log) {
  const height = panel.y[measure][log ? "log" : "linear"], x = panel.x[axis], y = height.scale;
  const px = value => (LEFT + share(x, value) * (END - LEFT)).toFixed(1);
  const py = value => (FLOOR - share(y, value) * (FLOOR - TOP)).toFixed(1);
  const drawable = dots => dots.filter(dot => axis in dot.x && measure in dot.y);
  const line = dots => "M" + dots.map(dot => `${px(dot.x[axis])},${py(dot.y[measure])}`).join("L");
  const traces = dots => {
    const out = new Map();
    for (const dot of drawable(dots)) out.set(dot.trace, [...(out.get(dot.trace) ?? []), dot]);
    return [...out.values()].map(own => own.sort((a, b) => a.x[axis] - b.x[axis]));
  };
  const front = new Set(panel.fronts[axis][measure] ?? []);
  const dots = drawable(panel.dots);

  let out = step(dots.filter(dot => front.has(dot.row)).map(dot => [dot.x[axis], dot.y[measure]]), px, py);
  for (const own of traces(panel.trails)) {
    out += `<g data-baseline><path class="trail" d="${line(own)}"/>`;
    for (const dot of own) {
      const at = `cx="${px(dot.x[axis])}" cy="${py(dot.y[measure])}"`;
      out += `<g data-row="${dot.row}" data-tip="${text(dot.tip)}"><circle class="reach" ${at} r="9"/><circle class="trailing" ${at} r="3"/></g>`;
    }
    const last = own.at(-1);
    out += tag((px(last.x[axis]) - 6).toFixed(1), (+py(last.y[measure]) + 15).toFixed(1), "barname", "end", last.trace) + "</g>";
  }
  for (const {rows, family, x: cost, reach} of panel.seeds) if (measure in reach) {
    const [low, high] = reach[measure].map(py), at = px(cost[axis]), left = (at - 11).toFixed(1);
    out += `<path class="seeds c${family % 8}" data-rows="${rows.join(" ")}" d="M${left},${low}h22M${left},${high}h22M${at},${low}V${high}"/>`;
  }
  for (const own of traces(panel.dots))
    out += `<path class="join c${own[0].family % 8}" data-rows="${own.map(dot => dot.row).join(" ")}" d="${line(own)}"/>`;
  for (const dot of dots) {
    const [at, up] = [px(dot.x[axis]), py(dot.y[measure])];
    const ends = dot.span[measure]?.map(py);
    out += `<g class="mark c${dot.family % 8}" data-row="${dot.row}" data-tip="${text(dot.tip)}">`
      + (ends ? `<path class="whisker" d="M${at},${ends[0]}V${ends[1]}"/>` : "")
      + `<circle class="reach" cx="${at}" cy="${up}" r="11"/><use class="dot" href="#s${dot.family % 8}" x="${at}" y="${up}"/></g>`;
  }
  return grid(x, y, px, py, data.axes[axis].title, data.measures[measure].title) + baselines(height, py)
    + `<g clip-path="url(#inside)">${out}</g>`;
}

function draw(plot) {
  const panel = data.panels[plot.dataset.panel], measure = all(".measure", plot)[0].value, box = all(".log", plot)[0];
  box.disabled = !("log" in panel.y[measure]);
  if (box.disabled) box.checked = false;
  const svg = all("svg.chart", plot)[0], title = `${data.measures[measure].short} against ${data.axes[state.axis].short}`;
  svg.innerHTML = scatter(panel, state.axis, measure, box.checked);
  svg.setAttribute("aria-label", `${title} under ${plot.dataset.protocol}`);
  all(".what", plot)[0].textContent = title;
  filter(plot);
  mark("pinned", pinned);
}
for (const plot of all(".plot")) {
  all(".measure", plot)[0].addEventListener("change", event => {
    all(".log", plot)[0].checked = data.measures[event.target.value].log;
    draw(plot);
  });
  all(".log", plot)[0].addEventListener("change", () => draw(plot));
}

// --- one replacement, wherever it is ---

const tip = byId("tip");
let pinned = null;

function mark(name, key) {
  for (const node of all(`[data-row].${name}`)) node.classList.remove(name);
  if (key !== null) for (const node of all(`[data-row="${key}"]`)) node.classList.add(name);
}
const keyAt = event => event.target.closest?.("[data-row]")?.dataset.row ?? null;

document.addEventListener("mouseover", event => {
  mark("hot", keyAt(event));
  tip.textContent = event.target.closest?.("[data-tip]")?.dataset.tip ?? "";
  tip.style.display = tip.textContent ? "block" : "none";
});
document.addEventListener("mousemove", event => {
  if (!tip.textContent) return;
  tip.style.left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8) + "px";
  tip.style.top = Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8) + "px";
});
document.addEventListener("focusin", event => mark("hot", keyAt(event)));
document.addEventListener("click", event => {
  const key = keyAt(event);
  if (key === null) return;
  pinned = pinned === key ? null : key;
  mark("pinned", pinned);
});

// --- print: every protocol, every fold open ---

addEventListener("beforeprint", () => {
  showChosen(true);
  for (const fold of all("details:not([open])")) { fold.open = true; fold.dataset.folded = ""; }
});
addEventListener("afterprint", () => {
  showChosen();
  for (const fold of all("details[data-folded]")) { fold.open = false; delete fold.dataset.folded; }
});

showChosen();
for (const plot of all(".plot")) draw(plot);
