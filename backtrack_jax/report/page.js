"use strict";
// Everything that a model wrote reaches the page through textContent, never as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);

if (window.staleReason) {
  byId("stale").textContent = `Out of date: ${window.staleReason}.`;
  byId("stale").hidden = false;
}

function fill(select, names, chosen) {
  select.replaceChildren(...names.map((name, i) => {
    const option = document.createElement("option");
    option.value = String(i);
    option.textContent = name;
    return option;
  }));
  select.value = String(Math.max(0, Math.min(chosen, names.length - 1)));
}

// Figures

function colours() {
  const style = getComputedStyle(document.documentElement);
  const value = (name) => style.getPropertyValue(name).trim();
  return { text: value("--text"), line: value("--line") };
}

function themed(layout) {
  const { text, line } = colours();
  const out = { ...layout, font: { ...layout.font, color: text, size: 12 } };
  for (const key of Object.keys(layout)) {
    if (/^[xy]axis/.test(key)) {
      out[key] = { ...layout[key], gridcolor: line, zerolinecolor: line, linecolor: line, automargin: true };
    }
  }
  return out;
}

// Drawn when they come near the window: all at once would keep a phone busy for seconds.
const seen = new Set();
const watcher = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    watcher.unobserve(entry.target);
    seen.add(entry.target);
    drawFigure(entry.target);
  }
}, { rootMargin: "400px" });

function drawFigure(place) {
  const figure = data.figures[place.dataset.figure];
  Plotly.react(place, figure.data, themed(figure.layout), { responsive: true, displaylogo: false });
}

// Theme

function setTheme(dark) {
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  byId("theme").setAttribute("aria-pressed", String(dark));
  seen.forEach(drawFigure);
  drawTrace();
}

// Traces

function shade(share) {
  const x = Math.max(-1, Math.min(1, share));
  return x >= 0 ? `rgba(214, 40, 40, ${0.75 * x})` : `rgba(40, 100, 214, ${-0.75 * x})`;
}

function currentTrace() {
  const set = data.projections[Number(byId("trace-role").value)];
  return { set, trace: set.traces[Number(byId("trace-id").value)] };
}

function scaleOf(set, layer, vector) {
  const squares = set.traces.flatMap((trace) => trace.values[layer][vector].map((x) => x * x));
  return 2.5 * Math.sqrt(squares.reduce((a, b) => a + b, 0) / Math.max(1, squares.length)) || 1;
}

function fillTrace() {
  const { set } = currentTrace();
  fill(byId("trace-id"), set.traces.map((trace) => `${trace.id} (${trace.category})`), Number(byId("trace-id").value) || 0);
  fill(byId("trace-layer"), set.layers.map(String), Math.max(0, set.layers.indexOf(data.layer)));
  fill(byId("trace-vector"), set.vectors.map((v) => `${v.label}, ${v.source}-derived`), 0);
}

function drawTrace() {
  const { set, trace } = currentTrace();
  const layer = Number(byId("trace-layer").value);
  const vector = Number(byId("trace-vector").value);
  const scale = scaleOf(set, layer, vector);
  // Of several sections that start at a token, the one with the experiment's label, else the first.
  const own = ([label]) => Number(label === data.label);
  const starts = new Map([...trace.starts].reverse().sort((a, b) => own(a) - own(b)).map(([label, at]) => [at, label]));
  const read = new Set(trace.read);
  byId("trace-problem").textContent = `Problem: ${trace.problem}`;
  byId("trace-tokens").replaceChildren(...trace.tokens.map((text, i) => {
    const span = document.createElement("span");
    const value = trace.values[layer][vector][i];
    span.textContent = text;
    span.style.background = shade(value / scale);
    if (read.has(i)) span.classList.add("read");
    if (starts.has(i)) span.classList.add(starts.get(i) === data.label ? "start" : "other");
    const section = starts.has(i) ? `, ${starts.get(i)} starts` : "";
    const window_ = read.has(i) ? ", read" : "";
    const tell = () => {
      byId("trace-hover").textContent = `token ${i} ${JSON.stringify(text)}: projection ${value.toFixed(2)}${section}${window_}`;
    };
    span.addEventListener("mouseenter", tell);
    span.addEventListener("click", tell);
    return span;
  }));
}

// Replies

function marked(place, text) {
  const parts = text.split(/((?<![\p{L}\p{N}])(?:wait|hmm)(?![\p{L}\p{N}]))/giu);
  place.replaceChildren(...parts.map((part, i) => {
    if (i % 2 === 0) return document.createTextNode(part);
    const mark = document.createElement("mark");
    mark.textContent = part;
    return mark;
  }));
}

function drawReplies() {
  const problem = data.replies.problems[Number(byId("reply-problem").value)];
  byId("reply-text").textContent = `Problem: ${problem.problem}`;
  for (const side of ["left", "right"]) {
    const condition = Number(byId(`reply-${side}`).value);
    const reply = problem.replies[condition];
    marked(byId(`reply-${side}-text`), reply ? reply.text : "not sampled");
    const cell = data.replies.conditions[condition].numbers;
    byId(`reply-${side}-numbers`).textContent = reply ? `${cell}; this reply ended by ${reply.finish_reason}` : cell;
  }
}

// Start

fill(byId("trace-role"), data.projections.map((set) => `${set.role} model`), data.projections.length - 1);
fillTrace();
fill(byId("reply-problem"), data.replies.problems.map((problem) => problem.id), 0);
fill(byId("reply-left"), data.replies.conditions.map((condition) => condition.name), data.replies.left);
fill(byId("reply-right"), data.replies.conditions.map((condition) => condition.name), data.replies.right);
byId("trace-role").addEventListener("change", () => { fillTrace(); drawTrace(); });
for (const id of ["trace-id", "trace-layer", "trace-vector"]) byId(id).addEventListener("change", drawTrace);
for (const id of ["reply-problem", "reply-left", "reply-right"]) byId(id).addEventListener("change", drawReplies);
for (const form of document.querySelectorAll("form")) form.addEventListener("submit", (event) => event.preventDefault());
byId("theme").addEventListener("click", () => setTheme(document.documentElement.dataset.theme !== "dark"));
drawReplies();
setTheme(window.matchMedia("(prefers-color-scheme: dark)").matches);
document.querySelectorAll(".plot").forEach((place) => watcher.observe(place));
