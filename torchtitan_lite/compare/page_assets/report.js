// The charts of report.html: drawn from the document with the id "curves", as curves.chart_data makes it.
"use strict";
(() => {
const sides = JSON.parse(document.getElementById("curves").textContent);
const figures = [...document.querySelectorAll(".chart")];
const state = { axis: "step", smooth: false, range: null, hidden: new Set(), at: null };
const EDGE = { left: 54, right: 24, top: 8, bottom: 24 };
const GAP = 13;           // between the letters at the ends of lines, in pixels
const LEAST_DRAG = 5;     // pixels; less is a click
const TIMES = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]];
// Of gradient norms and times, a few far values would press all others flat; memory and times that differ by little
// should look like little.
const ROBUST = new Set(["loss_gap", "grad_norm", "step_time_s"]);
const LEAST_SPAN = { loss: 1e-6, loss_gap: 0, grad_norm: 0.02, step_time_s: 0.05, memory_peak_gib: 0.05 };

const visible = () => sides.filter(side => !state.hidden.has(side.name));
const withAny = metric => visible().filter(side => side.middle[metric].some(value => value !== null));
const bold = side => state.smooth ? side.smooth : side.middle;
const thin = side => state.smooth ? [side.middle] : side.repeats;
// What the scale of values goes by: the runs, or only the smooth line.
const scaledBy = side => state.smooth || !side.repeats.length ? [bold(side)] : side.repeats;
const lineClass = index => `c${index % 8} d${(index + Math.floor(index / 8)) % 4}`;

// Numbers and scales

function tidy(value, digits = 5) {
  if (value === null || value === undefined) return "n/a";
  const size = Math.abs(value);
  if (size !== 0 && (size >= 1e6 || size < 1e-4)) return Number(value.toPrecision(Math.max(1, digits - 1))).toExponential();
  return String(Number(value.toPrecision(digits)));
}

function scaled(value) {
  let prefix = 0;
  while (Math.abs(value) >= 1000 && prefix < 5) { value /= 1000; prefix += 1; }
  return `${Number(value.toPrecision(4))}${["", " k", " M", " G", " T", " P"][prefix]}`;
}

function ticks(low, high, most) {
  const raw = (high - low) / most, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map(times => times * power).find(each => each >= raw * 0.999);
  const found = [];
  for (let count = Math.ceil(low / step - 1e-9); count * step <= high + step * 1e-9; count += 1) found.push(count * step);
  return found;
}

function timeUnit(most) {
  return TIMES.find(([size]) => most >= 2 * size) || TIMES[TIMES.length - 1];
}

function ofAxis(value, most) {
  if (state.axis === "step") return `step ${Math.round(value)}`;
  if (state.axis === "tokens") return `${scaled(value)} tokens`;
  const [size, unit] = timeUnit(most);
  return `${tidy(value / size, 4)} ${unit}`;
}

function quantile(sorted, part) {
  return sorted[Math.round(part * (sorted.length - 1))];
}

// Over all sides that are shown, so that charts lie beside each other.
function wholeRange() {
  let low = Infinity, high = -Infinity;
  for (const side of visible()) {
    const along = side.middle[state.axis];
    for (const curve of [...side.repeats, side.middle]) high = Math.max(high, curve[state.axis].at(-1));
    low = Math.min(low, along[0]);
  }
  if (low > high) return [0, 1];
  return low === high ? [low - 0.5, high + 0.5] : [low, high];
}

function valueRange(metric, [low, high]) {
  const values = [];
  for (const side of visible()) for (const run of scaledBy(side)) run[metric].forEach((value, index) => {
    const at = run[state.axis][index];
    if (value !== null && at >= low && at <= high) values.push(value);
  });
  if (!values.length) return { low: 0, high: 1, clipped: [] };
  values.sort((a, b) => a - b);
  let [least, most] = [values[0], values.at(-1)];
  if (ROBUST.has(metric)) {
    const [foot, head] = [quantile(values, 0.02), quantile(values, 0.98)];
    const reach = Math.max(head - foot, 0.02 * Math.abs(head));
    least = Math.max(least, foot - reach);
    most = Math.min(most, head + reach);
  }
  const span = Math.max(most - least, LEAST_SPAN[metric] * Math.max(Math.abs(least), Math.abs(most))) || 1;
  const middle = (least + most) / 2;
  const clipped = values.filter(value => value > most || value < least);
  return { low: middle - 0.54 * span, high: middle + 0.54 * span, clipped };
}

// Where `value` would stand in `along`, which rises.
function nearest(along, value) {
  let low = 0, high = along.length - 1;
  while (high - low > 1) {
    const half = (low + high) >> 1;
    if (along[half] <= value) low = half; else high = half;
  }
  return Math.abs(along[low] - value) <= Math.abs(along[high] - value) ? low : high;
}

// Drawing

function make(parent, name, attributes = {}, text = null) {
  const svg = parent.namespaceURI.endsWith("svg");
  const node = svg ? document.createElementNS(parent.namespaceURI, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== null) node.textContent = text;
  parent.append(node);
  return node;
}

function pathOf(chart, curve) {
  const along = curve[state.axis], values = curve[chart.metric];
  let path = "", drawn = false;
  values.forEach((value, index) => {
    if (value === null) { drawn = false; return; }
    const place = `${chart.x(along[index]).toFixed(1)},${chart.y(value).toFixed(1)}`;
    // A value between two that are missing is a line of no length, which its round ends make a dot.
    const alone = !drawn && (index + 1 === values.length || values[index + 1] === null);
    path += `${drawn ? "L" : "M"}${place}${alone ? "h0.01" : ""}`;
    drawn = true;
  });
  return path;
}

function draw(chart) {
  const { svg, metric, figure } = chart;
  const width = chart.plot.clientWidth, height = chart.plot.clientHeight;
  svg.replaceChildren();
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const range = state.range || wholeRange(), values = valueRange(metric, range);
  const right = width - EDGE.right, bottom = height - EDGE.bottom;
  const across = (right - EDGE.left) / (range[1] - range[0]), up = (bottom - EDGE.top) / (values.high - values.low);
  Object.assign(chart, {
    range, right, bottom,
    x: value => EDGE.left + (value - range[0]) * across,
    y: value => Math.max(-1e4, Math.min(1e4, bottom - (value - values.low) * up)),
    back: pixel => range[0] + (Math.max(EDGE.left, Math.min(right, pixel)) - EDGE.left) / across,
  });
  drawAxes(chart, values);
  const clip = make(make(make(svg, "defs"), "clipPath", { id: `clip-${metric}` }), "rect", {
    x: EDGE.left, y: EDGE.top - 1, width: right - EDGE.left + 1, height: bottom - EDGE.top + 2,
  }).parentNode;
  const lines = make(svg, "g", { "clip-path": `url(#${clip.id})` });
  for (const kind of ["repeat", "middle"]) for (const side of visible()) {
    for (const curve of kind === "repeat" ? thin(side) : [bold(side)]) {
      make(lines, "path", { class: `line ${kind} ${lineClass(side.index)}`, d: pathOf(chart, curve), "data-side": side.name });
    }
  }
  drawEnds(chart);
  const away = values.clipped.length;
  figure.querySelector(".clipped").textContent = away ? `${away} value${away > 1 ? "s" : ""} outside, up to ${tidy(values.clipped.at(-1), 3)}` : "";
  chart.over = make(svg, "g");
}

function drawAxes(chart, values) {
  const { svg, right, bottom, range } = chart;
  for (const tick of ticks(values.low, values.high, 5)) {
    make(svg, "line", { class: "grid", x1: EDGE.left, x2: right, y1: chart.y(tick), y2: chart.y(tick) });
    make(svg, "text", { x: EDGE.left - 6, y: chart.y(tick) + 4, "text-anchor": "end", class: "y-tick" }, tidy(tick));
  }
  const [size, unit] = state.axis === "seconds" ? timeUnit(range[1]) : [1, ""];
  const most = Math.max(2, Math.floor((right - EDGE.left) / 64));
  for (const tick of ticks(range[0] / size, range[1] / size, most)) {
    const at = chart.x(tick * size), text = state.axis === "tokens" ? scaled(tick) : `${tidy(tick, 6)} ${unit}`.trim();
    make(svg, "line", { class: "frame", x1: at, x2: at, y1: bottom, y2: bottom + 4 });
    make(svg, "text", { x: at, y: bottom + 17, "text-anchor": "middle", class: "x-tick" }, text);
  }
  make(svg, "line", { class: "frame", x1: EDGE.left, x2: right, y1: bottom, y2: bottom });
}

// A letter where each line ends, so that none must be told by its colour.
function drawEnds(chart) {
  const ends = [];
  for (const side of visible()) {
    const along = bold(side)[state.axis], values = bold(side)[chart.metric];
    let index = values.length - 1;
    while (index >= 0 && (values[index] === null || along[index] > chart.range[1])) index -= 1;
    if (index < 0 || along[index] < chart.range[0]) continue;
    const y = Math.max(EDGE.top + 6, Math.min(chart.bottom - 4, chart.y(values[index])));
    ends.push({ name: side.name, x: chart.x(along[index]) + 5, y });
  }
  ends.sort((a, b) => a.y - b.y);
  const last = chart.bottom - 4;
  ends.forEach((end, index) => { if (index) end.y = Math.max(end.y, ends[index - 1].y + GAP); });
  for (let index = ends.length - 1; index >= 0; index -= 1) {
    const below = index + 1 < ends.length ? ends[index + 1].y - GAP : last;
    ends[index].y = Math.min(ends[index].y, below);
  }
  for (const end of ends) make(chart.svg, "text", { class: "end", x: end.x, y: end.y + 4 }, end.name);
}

function drawAll() {
  document.querySelector(".charts").classList.toggle("smooth", state.smooth);
  charts.forEach(draw);
  document.querySelector(".reset").disabled = state.range === null;
  point(null, null);
}

// Pointing: a line in every chart, and the values in the one that is pointed at.

function snapped(value) {
  let best = null;
  for (const side of visible()) {
    const along = bold(side)[state.axis], at = along[nearest(along, value)];
    if (best === null || Math.abs(at - value) < Math.abs(best - value)) best = at;
  }
  return best;
}

function valueAt(side, metric, at) {
  const along = bold(side)[state.axis], index = nearest(along, at);
  const spacing = Math.max((along.at(-1) - along[0]) / Math.max(1, along.length - 1), 1e-9);
  const off = at < along[0] - spacing || at > along.at(-1) + spacing;
  return off ? null : { at: along[index], value: bold(side)[metric][index] };
}

function point(from, at) {
  state.at = at;
  for (const chart of charts) {
    chart.over.replaceChildren();
    chart.tip.hidden = at === null || chart !== from;
    if (at === null || at < chart.range[0] || at > chart.range[1]) continue;
    const x = chart.x(at);
    make(chart.over, "line", { class: "cross", x1: x, x2: x, y1: EDGE.top, y2: chart.bottom });
    for (const side of visible()) {
      const found = valueAt(side, chart.metric, at);
      const y = found && found.value !== null ? chart.y(found.value) : null;
      if (y !== null && y >= EDGE.top && y <= chart.bottom) {
        make(chart.over, "circle", { class: `spot c${side.index % 8}`, cx: chart.x(found.at), cy: y, r: 4 });
      }
    }
    if (chart === from) tell(chart, at, x);
  }
}

function tell(chart, at, x) {
  const { tip } = chart;
  tip.replaceChildren();
  make(tip, "b", {}, ofAxis(at, chart.range[1]));
  for (const side of withAny(chart.metric)) {
    const row = make(tip, "div"), found = valueAt(side, chart.metric, at);
    row.append(legendOf(side.name).querySelector("svg").cloneNode(true));
    make(row, "b", {}, side.name);
    make(row, "span", { class: "name" }, side.label);
    const said = found ? tidy(found.value, 6) : "n/a";
    make(row, "span", { class: "value" }, said === "n/a" ? said : `${said} ${chart.unit}`.trim());
  }
  const left = x > (EDGE.left + chart.right) / 2;
  tip.style.maxWidth = `${(left ? x : chart.plot.clientWidth - x) - 14}px`;
  tip.style.left = left ? "auto" : `${x + 14}px`;
  tip.style.right = left ? `${chart.plot.clientWidth - x + 14}px` : "auto";
}

// Zooming

function zoom(range) {
  const whole = wholeRange();
  if (range) {
    const low = Math.max(whole[0], range[0]), high = Math.min(whole[1], range[1]);
    range = high - low >= (whole[1] - whole[0]) * 1e-4 && (low > whole[0] || high < whole[1]) ? [low, high] : null;
  }
  state.range = range;
  drawAll();
}

function listen(chart) {
  const { plot } = chart;
  const place = event => event.clientX - plot.getBoundingClientRect().left;
  let start = null;
  plot.addEventListener("pointerdown", event => {
    if (event.button !== 0) return;
    start = place(event);
    plot.setPointerCapture(event.pointerId);
  });
  plot.addEventListener("pointermove", event => {
    const now = place(event);
    point(chart, snapped(chart.back(now)));
    if (start === null || Math.abs(now - start) < LEAST_DRAG) return;
    const [from, to] = [start, now].map(each => chart.x(chart.back(each))).sort((a, b) => a - b);
    make(chart.over, "rect", {
      class: "chosen", x: from, width: to - from, y: EDGE.top, height: chart.bottom - EDGE.top,
    });
  });
  plot.addEventListener("pointerup", event => {
    const [from, to] = [start, place(event)];
    start = null;
    if (from !== null && Math.abs(to - from) >= LEAST_DRAG) {
      zoom([chart.back(from), chart.back(to)].sort((a, b) => a - b));
    }
  });
  plot.addEventListener("pointercancel", () => { start = null; point(null, null); });
  plot.addEventListener("pointerleave", () => { if (start === null) point(null, null); });
  plot.addEventListener("dblclick", () => zoom(null));
  plot.addEventListener("blur", () => point(null, null));
  plot.addEventListener("keydown", event => { if (pressed(chart, event.key)) event.preventDefault(); });
}

function pressed(chart, key) {
  const [low, high] = chart.range, at = state.at === null ? (low + high) / 2 : state.at;
  const times = { "+": 0.5, "=": 0.5, "-": 2 }[key], way = { ArrowLeft: -1, ArrowRight: 1 }[key];
  if (times) {
    zoom([at - (at - low) * times, at + (high - at) * times]);
  } else if (way) {
    const places = [...new Set(visible().flatMap(side => bold(side)[state.axis]))].sort((a, b) => a - b);
    const next = places[nearest(places, at) + (state.at === null ? 0 : way)];
    if (next !== undefined && next >= low && next <= high) point(chart, next);
  } else if (key === "0") {
    zoom(null);
  } else if (key === "Escape") {
    point(null, null);
  } else {
    return false;
  }
  return true;
}

// Controls

function legendOf(name) {
  return document.querySelector(`.legend button[data-side="${name}"]`);
}

function toggle(button) {
  const name = button.dataset.side;
  if (state.hidden.has(name)) state.hidden.delete(name); else state.hidden.add(name);
  button.setAttribute("aria-pressed", String(!state.hidden.has(name)));
  drawAll();
}

const charts = figures.map(figure => {
  const plot = figure.querySelector(".plot");
  const holder = document.createElement("div");
  holder.innerHTML = "<svg></svg>";
  const svg = holder.firstChild, tip = make(plot, "div", { class: "tip", role: "status" });
  plot.prepend(svg);
  return { figure, plot, svg, tip, metric: figure.dataset.metric, unit: figure.dataset.unit };
});
if (!charts.length) return;
charts.forEach(listen);
document.querySelectorAll(".legend button").forEach(button => button.addEventListener("click", () => toggle(button)));
document.querySelectorAll("input[name=axis]").forEach(input => input.addEventListener("change", () => {
  state.axis = input.value;
  zoom(null);
}));
document.querySelector(".reset").addEventListener("click", () => zoom(null));
const smooth = document.querySelector("input[name=smooth]");
smooth.addEventListener("change", () => { state.smooth = smooth.checked; drawAll(); });
// A browser that goes back to the page may have kept the choices.
state.axis = document.querySelector("input[name=axis]:checked").value;
state.smooth = smooth.checked;
drawAll();
let width = 0;
new ResizeObserver(() => {
  if (width !== charts[0].plot.clientWidth) { width = charts[0].plot.clientWidth; drawAll(); }
}).observe(charts[0].plot);
})();
