// The page of a training run. Everything that comes from the run reaches the document as text nodes only.
"use strict";

// ------------------------------------------------------------------------------------------------------------- helpers

const $ = (id) => document.getElementById(id);

function h(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((child) => child != null && child !== false));
  return node;
}

// Characters that hide, reorder or have no picture, as in trl_epo.text.printable. Line breaks and tabs stay.
const HIDDEN = /[^\P{C}\n\t]|\p{Zl}|\p{Zp}|(?! )\p{Zs}/gu;

function escaped(character) {
  const code = character.codePointAt(0);
  const [mark, length] = code < 256 ? ["x", 2] : code < 65536 ? ["u", 4] : ["U", 8];
  return `\\${mark}${code.toString(16).padStart(length, "0")}`;
}

const printable = (text) => String(text).replace(HIDDEN, escaped);
const oneLine = (text) => printable(text).replace(/\n/g, "\\n").replace(/\t/g, "\\t");

// Text with its hidden characters written out and set apart.
function shown(text) {
  const parts = [];
  let start = 0;
  for (const found of text.matchAll(HIDDEN)) {
    if (found.index > start) parts.push(text.slice(start, found.index));
    parts.push(h("span", { class: "escaped" }, escaped(found[0])));
    start = found.index + found[0].length;
  }
  if (start < text.length) parts.push(text.slice(start));
  return parts;
}

function number(value, digits = 2) {
  if (value == null) return "–";
  const text = Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : value.toFixed(digits);
  return text.replace("-", "−");
}
// Three significant digits, or so.
const brief = (value) => number(value, value == null || Math.abs(value) < 1 ? 3 : Math.abs(value) < 10 ? 2 : 1);
const signed = (value, digits = 2) => (value > 0 ? "+" : "") + number(value, digits);
const percent = (value, digits = 0) => (value == null ? "–" : `${+(100 * value).toFixed(digits)} %`);
const many = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

async function unpacked(id) {
  const bytes = Uint8Array.from(atob($(id).textContent), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).json();
}

// --------------------------------------------------------------------------------------------------------------- state

let runs, episodes, count, twoRuns; // `episodes` has a list for each column
let keys; // the part of a link that names an episode -> its number
const kin = { start: new Map(), group: new Map() };
const state = {
  view: "curves",
  listed: [], // numbers of the episodes that the filters leave
  current: null,
  beside: null, // the episode to the left of `current` when two are compared
  shade: "entropy",
  range: null, // steps chosen in the curves
  matching: null, // what the text search found
};

const runOf = (n) => runs.findIndex((run) => run.name === episodes.run[n]);
const setOf = (n) => (episodes.mode[n] === "train" ? "train" : episodes.panel[n]);
const taskOf = (n) => episodes.task[n] ?? episodes.environment[n] ?? "";

function outcome(n) {
  const success = episodes.success[n];
  if (success === true) return { mark: "✓", word: "success", style: "good" };
  if (success === false) return { mark: "✗", word: "no success", style: "bad" };
  return { mark: "•", word: episodes.stop_reason[n] === "failure" ? "failed to play" : "not known", style: "unknown" };
}

const runMark = (run) => (twoRuns ? h("i", { class: `run-mark run-${run}`, "aria-hidden": "true" }) : null);
const mark = (n) => h("span", { class: `mark ${outcome(n).style}`, "aria-hidden": "true" }, outcome(n).mark);

// -------------------------------------------------------------------------------------------------------------- curves

const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const LETTERS = ["a", "b", "c", "d"];

// Each chart: a title, what it means, and for a run its lines: [label, series, style].
function chartSpecs() {
  const panelsOf = (run) => Object.entries(run.panels);
  const withPanels = (metric) => (run) => [
    ["train", run.train[metric], { role: 0, faint: panelsOf(run).length > 0 }],
    ...panelsOf(run).map(([panel, series], place) => [
      panel, series[metric],
      { role: place + 1, points: true, low: metric === "success_rate" && series.success_low, high: series.success_high },
    ]),
  ];
  return [
    { title: "Success rate", about: "Share of episodes that reach the goal; shaded: 95 % interval.", wide: true,
      unit: "share", lines: withPanels("success_rate") },
    { title: "Entropy in its corridor", about: "Mean over action tokens, nats; shaded: between floor and cap.", wide: true,
      lines: (run) => [
        ["entropy", run.train.entropy, { role: 0, low: run.train.corridor_low, high: run.train.corridor_high }],
        ["reference", run.train.entropy_reference, { role: "grey", dash: [5, 4], faint: twoRuns }],
      ] },
    { title: "Return", about: "Mean undiscounted return.", lines: withPanels("return") },
    { title: "Turns", about: "Mean number of turns.", lines: withPanels("turns") },
    { title: "Invalid actions", about: "Share of turns without a valid action.", unit: "share",
      lines: withPanels("invalid_actions") },
    { title: "Early and late turns", about: "Entropy in the first and second half of an episode, nats.",
      lines: (run) => [
        ["early", run.train.entropy_early_turns, { role: 0 }],
        ["late", run.train.entropy_late_turns, { role: 1, dash: [6, 3] }],
      ] },
    { title: "Outside the corridor", about: "Share of tokens: below it the floor acts, above it the cap.", unit: "share",
      lines: (run) => [
        ["above: cap", run.train.above_corridor, { role: "above", dash: [6, 3] }],
        ["below: floor", run.train.below_corridor, { role: "below" }],
      ] },
    { title: "Bonus and penalty", about: "Entropy bonus against smoothing penalty × β, nats.",
      lines: (run) => [
        ["bonus", run.train.entropy_bonus, { role: 0 }],
        ["penalty × β", product(run.train.smoothing_loss, run.train.phase_weight), { role: 1, dash: [6, 3] }],
      ] },
    { title: "Force on the mean entropy", about: "1: the cap pushes down, −1: the floor pushes up, 0: none.",
      lines: (run) => [["force", run.train.corridor_slope, { role: 0, stepped: true }]] },
  ];
}

function product(series, weights) {
  if (!series || !weights) return null;
  const weight = new Map(weights[0].map((step, place) => [step, weights[1][place]]));
  const steps = series[0].filter((step) => weight.has(step));
  const value = new Map(series[0].map((step, place) => [step, series[1][place]]));
  return [steps, steps.map((step) => value.get(step) * weight.get(step))];
}

function strokeOf(style, run) {
  if (typeof style.role === "string") return color(twoRuns ? LETTERS[run] : style.role);
  return color(LETTERS[twoRuns ? run : style.role % LETTERS.length]);
}

let charts = [];

function stepLimits() {
  const steps = runs.flatMap((run) => [run.train, ...Object.values(run.panels)].flatMap((s) => Object.values(s).flatMap((p) => p[0])));
  const low = steps.reduce((a, b) => Math.min(a, b), Infinity);
  const high = steps.reduce((a, b) => Math.max(a, b), -Infinity);
  return low < high ? [low, high] : [low - 1, high + 1];
}

function drawCharts() {
  for (const { plot } of charts) plot.destroy();
  charts = [];
  $("charts").replaceChildren();
  const limits = stepLimits();
  for (const spec of chartSpecs()) {
    const lines = runs.flatMap((run, place) =>
      spec.lines(run).filter(([, series]) => series && series[0].length).map(([label, series, style]) => ({ label, series, style, run: place })));
    if (lines.length) drawChart(spec, lines, limits);
  }
  if (!charts.length) {
    $("charts").append(h("p", { class: "muted" }, "No curves: the log has none of EPOTrainer's metrics."));
  } else if (count) {
    $("charts").append(h("p", { class: "hint" }, "Drag across a curve, or click on it, to see the episodes of these steps."));
  }
}

function drawChart(spec, lines, limits) {
  const tables = [];
  const series = [{ label: "step", value: (u, value, place, at) => number(u.data[0][at ?? u.data[0].length - 1], 0) }];
  const bands = [];
  const show = spec.unit === "share" ? (value) => percent(value, 1) : brief;
  for (const { label, series: points, style, run } of lines) {
    const stroke = strokeOf(style, run);
    tables.push(points);
    series.push({
      label: twoRuns ? `${oneLine(runs[run].name)} ${oneLine(label)}` : oneLine(label),
      stroke,
      alpha: style.faint ? 0.55 : 1,
      width: style.faint ? 1.25 : 2,
      dash: style.dash ?? (twoRuns && style.points ? [[8, 3], [3, 3], [8, 3, 2, 3]][(style.role - 1) % 3] : undefined),
      paths: style.stepped ? uPlot.paths.stepped({ align: 1 }) : undefined,
      points: { show: Boolean(style.points), size: 5, fill: stroke },
      value: (u, value, place, at) => show(lastKnown(u.data[place], at)),
    });
    if (style.low && style.high) {
      const place = series.length;
      tables.push(style.high, style.low);
      const edge = { stroke: "transparent", class: "quiet", label: "", points: { show: false } };
      series.push(edge, { ...edge });
      bands.push({ series: [place, place + 1], fill: withAlpha(stroke, twoRuns ? 0.1 : 0.13) });
      series[place - 1].edges = [place, place + 1];
    }
  }
  const box = h("div");
  const ends = h("span", { class: "ends number", title: "Mean of the first and of the last tenth of the logged steps" });
  runs.forEach((run, place) => {
    const main = lines.find((line) => line.run === place && line.style.points && line.series[0].length > 1) ?? lines.find((line) => line.run === place);
    if (!main) return;
    const [first, last] = endsOf(main.series);
    const name = lines.some((line) => line.run === place && line !== main) ? `${oneLine(main.label)} ` : "";
    ends.append(h("span", { class: "end" }, " ", runMark(place), `${name}${show(first)} → `, h("b", {}, show(last))));
  });
  $("charts").append(h("section", { class: `chart${spec.wide ? " wide" : ""}`, "aria-label": spec.title },
    h("header", {}, h("h2", {}, spec.title), ends), h("p", {}, spec.about), box));
  const axis = { stroke: color("muted"), grid: { stroke: color("line"), width: 1 }, ticks: { show: false }, font: "11px system-ui" };
  const plot = new uPlot({
    width: box.clientWidth || 400, height: spec.wide ? 230 : 180, padding: [8, 10, 0, 0],
    scales: { x: { time: false, range: limits }, y: { range: (u, low, high) => rangeOf(spec, low, high) } },
    axes: [
      { ...axis, size: 26, gap: 5 },
      { ...axis, size: 46, gap: 4, values: (u, ticks) => ticks.map((tick) => (spec.unit === "share" ? percent(tick) : String(+tick.toFixed(6)).replace("-", "−"))) },
    ],
    series, bands,
    cursor: {
      drag: { x: true, y: false, setScale: false },
      sync: { key: "steps", filters: { pub: (type) => type === "mousemove" || type === "mouseleave" } },
      points: { size: 7 },
    },
    legend: { live: true, markers: { dash: (u, place) => ({ undefined: "solid", 3: "dotted" })[u.series[place].dash?.[0]] ?? "dashed" } },
    hooks: {
      drawClear: [drawRange],
      setSelect: [(u) => chooseRange(u)],
      setSeries: [(u, place, options) => {
        if (options.show != null) for (const edge of u.series[place]?.edges ?? []) u.setSeries(edge, { show: options.show });
      }],
      ready: [(u) => u.over.addEventListener("click", () => chooseStep(u))],
    },
  }, uPlot.join(tables), box);
  plot.setLegend({ idx: plot.data[0].length - 1 }); // the newest values, until the pointer is on a curve
  plot.over.setAttribute("aria-hidden", "true");
  charts.push({ plot, box, spec });
}

function rangeOf(spec, low, high) {
  if (low == null) return [0, 1];
  const room = (high - low || Math.abs(high) || 1) * 0.08;
  if (spec.unit === "share" && high > 0.5) return [-0.02, 1.02];
  return [low >= 0 && low < 0.6 * high ? 0 : low - room, high + room];
}

function lastKnown(values, at) {
  for (let place = at ?? values.length - 1; place >= 0; place--) if (values[place] != null) return values[place];
  return null;
}

function endsOf([, values]) {
  const size = Math.max(1, Math.floor(values.length / 10));
  return [mean(values.slice(0, size)), mean(values.slice(-size))];
}

function withAlpha(hex, alpha) {
  const [r, g, b] = [1, 3, 5].map((place) => parseInt(hex.slice(place, place + 2), 16));
  return `rgb(${r} ${g} ${b} / ${alpha})`;
}

function drawRange(u) {
  if (!state.range) return;
  const [left, right] = state.range.map((step) => u.valToPos(step, "x", true));
  u.ctx.save();
  u.ctx.fillStyle = withAlpha(color("accent"), 0.14);
  u.ctx.fillRect(left - 2, u.bbox.top, right - left + 4, u.bbox.height);
  u.ctx.restore();
}

function chooseRange(u) {
  if (u.select.width < 4) return;
  const [low, high] = [u.select.left, u.select.left + u.select.width].map((place) => Math.round(u.posToVal(place, "x")));
  u.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
  u.justDragged = true;
  setRange([low, high]);
}

function chooseStep(u) {
  if (u.justDragged) {
    u.justDragged = false;
    return;
  }
  const steps = [...new Set(episodes.step)];
  if (!steps.length) return;
  const step = u.posToVal(u.cursor.left, "x");
  const nearest = steps.reduce((best, other) => (Math.abs(other - step) < Math.abs(best - step) ? other : best));
  setRange([nearest, nearest]);
}

function setRange(range) {
  state.range = range;
  for (const { plot } of charts) plot.redraw(false);
  $("range").hidden = !range || !count;
  if (!range || !count) return;
  const [low, high] = range;
  const inside = all().filter((n) => episodes.step[n] >= low && episodes.step[n] <= high);
  $("range").replaceChildren(
    h("b", {}, low === high ? `Step ${low}` : `Steps ${low} to ${high}`), h("span", {}, summary(inside)),
    h("button", { class: "button main", id: "show-range", disabled: !inside.length, click: () => {
      resetFilters();
      $("f-from").value = low;
      $("f-to").value = high;
      applyFilters();
      setView("episodes");
      if (state.listed.length) open(state.listed[0]);
      setRange(null);
    } }, "Show them"),
    h("button", { class: "button", click: () => setRange(null) }, "Clear"),
  );
}

// What happened, in sentences, from the log alone.
function inShort() {
  const boxes = runs.map((run, place) => {
    const lines = sentences(run);
    if (!lines.length) return null;
    return h("section", { class: "short" }, h("h2", {}, runMark(place), twoRuns ? oneLine(run.name) : "In short"),
      h("ul", {}, lines.map((line) => h("li", {}, line))));
  });
  $("in-short").replaceChildren(...boxes.filter(Boolean));
}

function sentences(run) {
  const lines = [];
  const success = (name, series) => {
    const [steps, values] = series;
    if (steps.length === 1) {
      lines.push(`Success on ${oneLine(name)}: ${percent(values[0])} at step ${steps[0]}, the only evaluation.`);
      return;
    }
    const best = values.reduce((a, b) => Math.max(a, b));
    const [first, last] = endsOf(series);
    const fell = best - last > 0.1 ? `; the best, ${percent(best)}, was at step ${steps[values.indexOf(best)]}` : "";
    lines.push(`Success on ${oneLine(name)}: ${percent(first)} at the start, ${percent(last)} in the end${fell}.`);
  };
  const panels = Object.entries(run.panels).filter(([, series]) => series.success_rate);
  for (const [panel, series] of panels) success(panel, series.success_rate);
  const isEvaluated = panels.some(([, series]) => series.success_rate[0].length > 1);
  if (!isEvaluated && run.train.success_rate) success("training episodes", run.train.success_rate);
  const { entropy, corridor_low: low, corridor_high: high } = run.train;
  if (entropy) {
    const [first, last] = endsOf(entropy);
    let text = `Entropy: ${number(first)} nats at the start, ${number(last)} in the end`;
    if (low && high) {
      const floor = new Map(low[0].map((step, place) => [step, low[1][place]]));
      const cap = new Map(high[0].map((step, place) => [step, high[1][place]]));
      const logged = entropy[0].map((step, place) => [step, entropy[1][place]]).filter(([step]) => floor.has(step) && cap.has(step));
      const below = logged.filter(([step, value]) => value < floor.get(step));
      const above = logged.filter(([step, value]) => value > cap.get(step));
      if (!below.length && !above.length && logged.length) text += ", within its corridor throughout";
      if (below.length) text += `; below its corridor at ${below.length} of ${logged.length} logged steps, first at step ${below[0][0]}`;
      if (above.length) text += `; above it at ${above.length} of ${logged.length} logged steps, first at step ${above[0][0]}`;
    }
    lines.push(`${text}.`);
  }
  const { entropy_early_turns: early, entropy_late_turns: late } = run.train;
  if (early && late) {
    const [e, l] = [endsOf(early)[1], endsOf(late)[1]];
    const more = l > 1.25 * e ? "late turns have more" : e > 1.25 * l ? "early turns have more" : "about alike";
    lines.push(`In the end, entropy of early turns ${number(e)}, of late turns ${number(l)} nats: ${more}.`);
  }
  const { below_corridor: below, above_corridor: above } = run.train;
  if (below && above) {
    const [b, a] = [endsOf(below)[1], endsOf(above)[1]];
    lines.push(`In the end, ${percent(b)} of the tokens are below the corridor (the floor acts) and ${percent(a)} above it (the cap acts).`);
  }
  return lines;
}

// ---------------------------------------------------------------------------------------------------------------- list

const ROW = 54; // pixels; as in the style sheet
const all = () => Array.from({ length: count }, (_, n) => n);

function summary(numbers) {
  const average = (name) => {
    const known = numbers.map((n) => episodes[name][n]).filter((value) => value != null);
    return known.length ? mean(known.map(Number)) : null;
  };
  const parts = [many(numbers.length, "episode")];
  if (average("success") != null) parts.push(`${percent(average("success"))} success`);
  if (average("num_turns") != null) parts.push(`${number(average("num_turns"), 1)} turns`);
  return parts.join(" · ");
}

function makeFilters() {
  const select = (id, label, values, names = (value) => value) => {
    const known = [...values].sort((a, b) => b[1] - a[1] || (a[0] < b[0] ? -1 : 1));
    if (known.length < 2) return null;
    const options = known.map(([value, number]) => h("option", { value }, `${oneLine(names(value))} (${number.toLocaleString("en")})`));
    return h("label", {}, h("span", { class: "hidden-label" }, label),
      h("select", { id, change: applyFilters, title: label }, h("option", { value: "" }, label), options));
  };
  const counted = (of) => {
    const counts = new Map();
    for (const n of all()) if (of(n)) counts.set(of(n), (counts.get(of(n)) ?? 0) + 1);
    return counts;
  };
  const steps = (id, label) => h("label", {}, h("span", { class: "hidden-label" }, label),
    h("input", { id, type: "number", inputmode: "numeric", placeholder: label, input: applyFilters }));
  const order = { step: "by step", return: "highest return", num_turns: "most turns", num_invalid: "most invalid", entropy: "highest entropy", "-entropy": "lowest entropy" };
  $("filters").replaceChildren(...[
    h("label", { class: "search" }, h("span", { class: "hidden-label" }, "Search the texts"),
      h("input", { id: "f-text", class: "search", type: "search", placeholder: "Search the texts   ( / )", input: search })),
    select("f-run", "All runs", counted((n) => episodes.run[n])),
    select("f-set", "All sets", counted(setOf), (set) => (set === "train" ? "training" : set)),
    select("f-task", "All tasks", counted(taskOf)),
    select("f-success", "Any outcome", counted((n) => outcome(n).word)),
    select("f-stop", "Any end", counted((n) => episodes.stop_reason[n])),
    h("div", { class: "steps" }, "Steps", steps("f-from", "from"), steps("f-to", "to"),
      h("label", {}, h("span", { class: "hidden-label" }, "Order"), h("select", { id: "f-order", change: applyFilters, title: "Order" },
        Object.entries(order).map(([value, name]) => h("option", { value }, name))))),
  ].filter(Boolean));
  $("filters").addEventListener("submit", (event) => event.preventDefault());
}

const filter = (id) => $(id)?.value ?? "";

function resetFilters() {
  for (const input of $("filters").querySelectorAll("input, select")) input.value = input.id === "f-order" ? "step" : "";
  state.matching = null;
}

function applyFilters() {
  const [run, set, task, success, stop] = ["f-run", "f-set", "f-task", "f-success", "f-stop"].map(filter);
  const low = filter("f-from") === "" ? -Infinity : Number(filter("f-from"));
  const high = filter("f-to") === "" ? Infinity : Number(filter("f-to"));
  state.listed = all().filter((n) =>
    (!run || episodes.run[n] === run) && (!set || setOf(n) === set) && (!task || taskOf(n) === task)
    && (!success || outcome(n).word === success) && (!stop || episodes.stop_reason[n] === stop)
    && episodes.step[n] >= low && episodes.step[n] <= high && (!state.matching || state.matching.has(n)));
  const [, sign, column] = /^(-?)(.*)$/.exec(filter("f-order") || "step");
  if (column !== "step") {
    const values = episodes[column];
    const direction = sign ? 1 : -1;
    const worst = -Infinity * direction;
    state.listed.sort((a, b) => direction * ((values[a] ?? -direction * worst) - (values[b] ?? -direction * worst)) || a - b);
  }
  showFound();
  $("list").scrollTop = 0;
  drawList();
}

function showFound(note) {
  const filtered = state.listed.length < count || filter("f-text");
  $("found").replaceChildren(h("span", {}, note ?? summary(state.listed)),
    ...(filtered ? [h("button", { type: "button", click: () => { resetFilters(); applyFilters(); } }, "All episodes")] : []));
}

let searches = 0;

async function search() {
  const mine = ++searches;
  await new Promise((resolve) => setTimeout(resolve, 200));
  const wanted = filter("f-text").toLowerCase();
  if (mine !== searches) return;
  if (!wanted) {
    state.matching = null;
    applyFilters();
    return;
  }
  const found = new Set();
  const inChunk = new Map();
  for (const n of all()) {
    const [chunk, place] = episodes.text[n];
    if (!inChunk.has(chunk)) inChunk.set(chunk, []);
    inChunk.get(chunk).push([n, place]);
  }
  let done = 0;
  for (const [chunk, members] of inChunk) {
    const texts = await unpacked(`text-${chunk}`);
    if (mine !== searches) return;
    for (const [n, place] of members) {
      const { first_observation, turns } = texts[place];
      const words = [taskOf(n), first_observation ?? "", ...turns.flatMap(([, , text, action, , , observation]) => [text ?? "", action ?? "", observation ?? ""])];
      if (words.some((text) => text.toLowerCase().includes(wanted))) found.add(n);
    }
    done += members.length;
    if (done % 512 < 16) showFound(`Searching … ${percent(done / count)}`);
  }
  state.matching = found;
  applyFilters();
}

function drawList() {
  const list = $("list");
  $("rows").style.height = `${state.listed.length * ROW}px`;
  const first = Math.max(0, Math.floor(list.scrollTop / ROW) - 8);
  const last = Math.min(state.listed.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + 8);
  $("rows").replaceChildren(...state.listed.slice(first, last).map((n, place) => listRow(n, first + place)));
  const active = $(`row-${state.current}`);
  if (active) list.setAttribute("aria-activedescendant", active.id);
  else list.removeAttribute("aria-activedescendant");
}

function listRow(n, place) {
  const e = episodes;
  const set = setOf(n) === "train" ? "train" : oneLine(setOf(n));
  const invalid = e.num_invalid[n] ? ` · ${e.num_invalid[n]} invalid` : "";
  const row = h("div", {
    class: `row${n === state.beside ? " pinned" : ""}`, role: "option", id: `row-${n}`, "aria-selected": String(n === state.current),
    "aria-posinset": place + 1, "aria-setsize": state.listed.length, click: () => open(n),
  },
  h("div", {}, mark(n), h("span", { class: "hidden-label" }, outcome(n).word), runMark(runOf(n)),
    h("span", { class: "what" }, oneLine(taskOf(n)) || "episode"), h("span", { class: "muted" }, `row ${e.row[n]}`),
    h("span", { class: "return number", title: "Return" }, number(e.return[n]))),
  h("div", { class: "under number" }, h("span", {}, `step ${e.step[n]} · ${set} · ${many(e.num_turns[n], "turn")}${invalid}`),
    h("span", { class: "end", title: "Why it ended" }, oneLine(e.stop_reason[n]))));
  row.style.top = `${place * ROW}px`;
  return row;
}

function scrollToCurrent() {
  const place = state.listed.indexOf(state.current);
  const list = $("list");
  if (place < 0) return;
  if (place * ROW < list.scrollTop) list.scrollTop = place * ROW;
  else if ((place + 1) * ROW > list.scrollTop + list.clientHeight) list.scrollTop = (place + 1) * ROW - list.clientHeight;
}

function move(by) {
  if (!state.listed.length) return;
  setView("episodes");
  const place = state.listed.indexOf(state.current);
  open(state.listed[place < 0 ? 0 : clamp(place + by, 0, state.listed.length - 1)]);
}

// ------------------------------------------------------------------------------------------------------------- episode

const chunks = new Map(); // those last used

function chunk(id) {
  const content = chunks.get(id) ?? unpacked(id);
  chunks.delete(id);
  chunks.set(id, content);
  if (chunks.size > 24) chunks.delete(chunks.keys().next().value);
  return content;
}

async function load(n) {
  const [textChunk, place] = episodes.text[n];
  const text = (await chunk(`text-${textChunk}`))[place];
  const where = episodes.tokens[n];
  const tokens = where && (await chunk(`tokens-${where[0]}`))[where[1]];
  return { n, ...text, tokens };
}

async function open(n, beside = state.beside) {
  state.current = n;
  state.beside = beside === n ? null : beside;
  setHash();
  scrollToCurrent();
  drawList();
  const loaded = await Promise.all((state.beside == null ? [n] : [state.beside, n]).map(load));
  if (state.current === n && (state.beside ?? n) === loaded[0].n) drawDetail(loaded);
}

// The episode that is worth comparing most: the same start in the other run, at another step, or of the same group.
function counterpart(n) {
  const { step, run } = episodes;
  const nearest = (numbers) => numbers.sort((a, b) => Math.abs(step[a] - step[n]) - Math.abs(step[b] - step[n]))[0];
  const same = sameStart(n);
  const other = same.filter((m) => run[m] !== run[n]);
  if (other.length) return nearest(other);
  const elsewhere = same.filter((m) => step[m] !== step[n]);
  return elsewhere.find((m) => episodes.success[m] !== episodes.success[n]) ?? elsewhere[0] ?? sameGroup(n)[0] ?? null;
}

const startKey = (n) => `${setOf(n) === "train"} ${episodes.start[n]}`;
const groupKey = (n) => JSON.stringify([episodes.run[n], setOf(n), episodes.step[n], episodes.rl_step[n], episodes.group[n]]);

function kinOf(name, key, n) {
  const map = kin[name];
  if (!map.size) {
    for (const m of all()) {
      if (!map.has(key(m))) map.set(key(m), []);
      map.get(key(m)).push(m);
    }
  }
  return map.get(key(n)).filter((m) => m !== n);
}
const sameStart = (n) => kinOf("start", startKey, n).filter((m) => episodes.step[m] !== episodes.step[n] || episodes.run[m] !== episodes.run[n]);
const sameGroup = (n) => kinOf("group", groupKey, n);

function compare() {
  if (state.current == null) return;
  if (state.beside != null) return open(state.current, null);
  const other = counterpart(state.current);
  if (other == null) return toast("No other episode began like this one. Choose two in the list.");
  return open(other, state.current);
}

function drawDetail(loaded) {
  const two = loaded.length === 2;
  const scale = scaleOf(loaded);
  const depth = Math.max(...loaded.map((episode) => episode.turns.length));
  const pair = h("div", { class: two ? "pair two" : "pair" });
  pair.append(...loaded.map((episode, side) => about(episode, loaded, side)));
  pair.append(...loaded.map((episode) => h("div", { class: "start" }, h("div", { class: "card" }, says("start", episode.first_observation ?? "")))));
  for (let place = 0; place < depth; place++) pair.append(...loaded.map((episode) => turn(episode, place, scale)));
  const tools = h("div", { class: "bar" },
    h("button", { class: "button", title: "Previous (k)", click: () => move(-1) }, "↑ Previous"),
    h("button", { class: "button", title: "Next (j)", click: () => move(1) }, "↓ Next"),
    h("button", { class: "button", id: "compare", title: "Beside another (c)", "aria-pressed": String(two), click: compare }, "Compare"),
    h("button", { class: "button", id: "copy", title: "Copy a link to what is shown", click: copyLink }, "Copy link"),
    h("span", { class: "grow" }), shadeButtons(loaded), scaleLegend(scale));
  $("tip").hidden = true;
  $("detail").replaceChildren(tools, pair);
  $("detail").scrollTop = 0;
  $("detail").episodes = loaded;
}

function redrawDetail() {
  const top = $("detail").scrollTop;
  if ($("detail").episodes) drawDetail($("detail").episodes);
  $("detail").scrollTop = top;
}

function about(episode, loaded, side) {
  const { n } = episode;
  const e = episodes;
  const end = outcome(n);
  const facts = {
    outcome: h("span", { class: end.style }, end.word), return: number(e.return[n]), step: e.step[n],
    set: setOf(n) === "train" ? "training" : oneLine(setOf(n)), ended: oneLine(e.stop_reason[n]),
    turns: `${e.num_turns[n]}${e.num_invalid[n] ? `, ${e.num_invalid[n]} invalid` : ""}`,
    entropy: e.entropy[n] == null ? null : `${number(e.entropy[n], 3)} nats`,
    corridor: e.corridor_low[n] == null ? null : `${number(e.corridor_low[n])} to ${number(e.corridor_high[n])} nats`,
    row: e.row[n], group: e.group[n], seed: e.seed[n], temperature: e.temperature[n],
    environment: e.environment[n] && oneLine(e.environment[n]), options: episode.options && episode.options !== "{}" ? oneLine(episode.options) : null,
  };
  const near = (a, b) => Math.abs(e.step[a] - e.step[n]) - Math.abs(e.step[b] - e.step[n]) || a - b;
  const kinRow = (label, numbers, name) => numbers.length ? h("div", { class: "kin" }, h("span", {}, label),
    [...numbers.sort(near).slice(0, 40), n].sort((a, b) => a - b).map((m) => h("button", {
      class: "chip number", "aria-current": String(m === n), title: `${outcome(m).word}, return ${number(e.return[m])}: show beside`,
      click: () => m !== n && (loaded.length === 2 && side === 0 ? open(m, loaded[1].n) : open(m, loaded.length === 2 ? loaded[0].n : n)),
    }, runMark(runOf(m)), mark(m), name(m))), numbers.length > 40 ? `and ${numbers.length - 40} more` : null) : null;
  const close = loaded.length === 2 ? h("button", { class: "button", click: () => open(loaded[1 - side].n, null) }, "Close") : null;
  return h("section", { class: "about" },
    h("h2", {}, mark(n), runMark(runOf(n)), h("span", {}, twoRuns ? `${oneLine(e.run[n])}: ` : "", oneLine(taskOf(n)) || `row ${e.row[n]}`,
      `, step ${e.step[n]}`), close),
    h("dl", { class: "facts number" }, Object.entries(facts).filter(([, value]) => value != null && value !== "")
      .map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value)))),
    turnChart(episode, loaded),
    kinRow("Same start at step", sameStart(n), (m) => String(e.step[m])),
    kinRow("Same group", sameGroup(n), (m) => number(e.return[m])),
    episode.failures.map(({ kind, turn, cause }, place) => h("div", { class: "failure" },
      `Attempt ${place + 1} failed after ${many(turn ?? 0, "turn")}: ${oneLine(kind)}`, h("pre", {}, shown(cause ?? "")))),
    episode.tokens ? null : h("p", { class: "muted" }, "The page is too large for the tokens of all episodes: it has the texts alone of this one."));
}

const turnMeans = ({ tokens }) => (tokens ?? []).map(([, , entropies]) => {
  const known = entropies.filter((value) => value != null);
  return known.length ? mean(known) : null;
});

// Mean entropy of each turn in the corridor; a click leads to the turn. Episodes beside each other have the same scales.
function turnChart(episode, loaded) {
  const means = turnMeans(episode);
  if (means.filter((value) => value != null).length < 2) return null;
  const length = Math.max(...loaded.map(({ turns }) => turns.length));
  const top = Math.max(...loaded.flatMap((other) => [episodes.corridor_high[other.n] ?? 0, ...turnMeans(other)]));
  const box = h("div", { class: "turn-chart", role: "img", "aria-label": `Mean entropy of each turn: ${means.map((value) => number(value)).join(", ")} nats` });
  const [low, high] = [episodes.corridor_low[episode.n], episodes.corridor_high[episode.n]];
  const stroke = color(LETTERS[twoRuns ? runOf(episode.n) : 0]);
  const edge = { stroke: "transparent", points: { show: false } };
  const axis = { stroke: color("muted"), grid: { stroke: color("line"), width: 1 }, ticks: { show: false }, font: "11px system-ui" };
  // Its width is known only once it is in the document.
  requestAnimationFrame(() => {
    if (!box.isConnected) return;
    const plot = new uPlot({
      width: box.clientWidth, height: 96, padding: [6, 8, 0, 0], legend: { show: false },
      scales: { x: { time: false, range: [0.5, length + 0.5] }, y: { range: [0, 1.1 * top || 1] } },
      axes: [{ ...axis, size: 22, gap: 3, incrs: [1, 2, 5, 10, 20, 50, 100] }, { ...axis, size: 46, gap: 4, space: 24, label: null }],
      series: [{}, { stroke, width: 2, points: { show: true, size: 5, fill: stroke } }, edge, edge],
      bands: [{ series: [2, 3], fill: withAlpha(stroke, 0.13) }],
      cursor: { drag: { x: false, y: false }, y: false },
      hooks: { ready: [(u) => u.over.addEventListener("click", () => {
        const turns = $("detail").querySelectorAll(`.turn[data-episode="${episode.n}"]`);
        turns[clamp(Math.round(u.posToVal(u.cursor.left, "x")), 1, turns.length) - 1]?.scrollIntoView({ block: "center" });
      })] },
    }, [means.map((_, place) => place + 1), means, means.map(() => high), means.map(() => low)], box);
    plot.over.title = "A click leads to the turn";
  });
  return h("figure", {}, h("figcaption", {}, `Mean entropy of each turn, nats${low == null ? "" : "; shaded: its corridor"}`), box);
}

function says(label, text) {
  return h("div", { class: "env" }, h("span", { class: "label" }, label), h("pre", {}, shown(text)));
}

function turn(episode, place, scale) {
  if (place >= episode.turns.length) return h("div", { class: "turn none" }, place === episode.turns.length ? `Ended: ${oneLine(episodes.stop_reason[episode.n])}` : "");
  const [prompt, startsContext, text, action, valid, cut, observation, reward, advantage] = episode.turns[place];
  const tokens = episode.tokens?.[place];
  const entropies = tokens?.[2].filter((value) => value != null) ?? [];
  const where = (mark) => tokens ? tokens[2].filter((value) => position(value, episode.n) === mark).length : 0;
  const body = h("pre", { class: "said", tabindex: tokens ? 0 : null, role: "group", "aria-label": `What the model wrote in turn ${place + 1}` });
  if (tokens && tokens[0].length && state.shade !== "none") body.append(...tokens[0].map((token, at) => tokenSpan(episode, place, at, scale)));
  else body.append(...shown(text ?? ""));
  body.episode = episode;
  body.place = place;
  const details = h("details", { toggle: () => { if (!details.querySelector("pre")) details.append(h("pre", {}, shown(prompt ?? ""))); } },
    h("summary", {}, `Prompt the model saw · ${many((prompt ?? "").length, "character")}${startsContext && place ? " · new context" : ""}`));
  return h("article", { class: "turn", "data-episode": episode.n, "aria-label": `Turn ${place + 1}` },
    h("header", { class: "number" }, h("h3", {}, `Turn ${place + 1}`),
      valid === false ? h("span", { class: "tag bad" }, "invalid") : null, cut ? h("span", { class: "tag bad" }, "cut by the token limit") : null,
      startsContext && place ? h("span", { class: "tag" }, "new context") : null, h("span", { class: "grow" }),
      h("span", { class: "muted" }, "reward ", h("b", { class: reward > 0 ? "good" : reward < 0 ? "bad" : "" }, signed(reward))),
      advantage == null ? null : h("span", { class: "muted" }, "advantage ", h("b", { class: advantage > 0 ? "good" : advantage < 0 ? "bad" : "" }, signed(advantage))),
      entropies.length ? h("span", { class: "muted", title: "Mean entropy, nats" }, `entropy ${number(mean(entropies))}`) : null,
      entropies.length && episodes.corridor_low[episode.n] != null ? h("span", { title: "Tokens above the cap, and below the floor" },
        h("span", { class: "above-mark", "aria-label": `${where("above")} above the cap` }, `▲${where("above")}`), " ",
        h("span", { class: "below-mark", "aria-label": `${where("below")} below the floor` }, `▼${where("below")}`)) : null),
    h("div", { class: `card${valid === false ? " invalid" : ""}` }, details, body,
      h("div", { class: "act" }, h("span", { class: "label" }, "action"), action == null ? h("span", { class: "bad" }, "none found in the text") : h("pre", { class: valid === false ? "bad" : "" }, shown(action))),
      says("environment", observation ?? "")));
}

function position(entropy, n) {
  const [low, high] = [episodes.corridor_low[n], episodes.corridor_high[n]];
  if (entropy == null || low == null || high == null) return null;
  return entropy > high ? "above" : entropy < low ? "below" : "within";
}

function tokenSpan(episode, place, at, scale) {
  const [tokens, logprobs, entropies] = episode.tokens[place];
  const where = position(entropies[at], episode.n);
  const special = /^<[|｜].*[|｜]>$|^<\/?s>$/.test(tokens[at]);
  const marked = state.shade === "entropy" && (where === "above" || where === "below") ? ` ${where}` : "";
  const span = h("span", { class: `tok${marked}${special ? " special" : ""}`, "data-at": at }, shown(tokens[at].replace(/\n/g, "↵\n")));
  const [tint, shade] = shadeOf(entropies[at], logprobs[at], episode.turns[place][8], scale);
  if (shade > 0.01) {
    span.style.setProperty("--tint", `var(--${tint})`);
    span.style.setProperty("--shade", shade.toFixed(2));
  }
  return span;
}

// How dark is darkest: twice the cap, where there is one.
function scaleOf(loaded) {
  const caps = loaded.map(({ n }) => episodes.corridor_high[n]).filter((cap) => cap != null);
  const seen = loaded.flatMap(({ tokens }) => (tokens ?? []).flatMap((turn) => turn[2])).filter((value) => value != null).sort((a, b) => a - b);
  const advantages = loaded.flatMap(({ turns }) => turns.map((turn) => Math.abs(turn[8] ?? 0)));
  return {
    entropy: caps.length ? 2 * Math.max(...caps) : Math.max(seen[Math.floor(seen.length * 0.98)] ?? 0, 0.1),
    logprob: 6,
    advantage: advantages.reduce((a, b) => Math.max(a, b), 0) || 1,
    corridors: loaded.map(({ n }) => [episodes.corridor_low[n], episodes.corridor_high[n]]).filter(([low, high]) => low != null && high != null),
  };
}

function shadeOf(entropy, logprob, advantage, scale) {
  if (state.shade === "entropy") return ["heat", 0.8 * clamp((entropy ?? 0) / scale.entropy, 0, 1)];
  if (state.shade === "logprob") return ["cool", 0.7 * clamp(-(logprob ?? 0) / scale.logprob, 0, 1)];
  if (state.shade === "advantage") return [advantage < 0 ? "minus" : "plus", 0.45 * clamp(Math.abs(advantage ?? 0) / scale.advantage, 0, 1)];
  return ["heat", 0];
}

function shadeButtons(loaded) {
  const shades = { entropy: "Entropy", logprob: "Log-prob", advantage: "Advantage", none: "Plain" };
  if (loaded.every(({ turns }) => turns.every((turn) => turn[8] == null))) delete shades.advantage;
  if (!(state.shade in shades)) state.shade = "entropy";
  return h("div", { class: "shades", role: "group", "aria-label": "Shade tokens by" }, Object.entries(shades).map(([shade, name]) =>
    h("button", { class: "button", "aria-pressed": String(state.shade === shade), click: () => { state.shade = shade; redrawDetail(); } }, name)));
}

function scaleLegend(scale) {
  const { shade } = state;
  if (shade === "none") return null;
  const ramp = h("span", { class: `ramp ${shade}`, "aria-hidden": "true" });
  const parts = { entropy: ["0", `${number(scale.entropy)} nats`], logprob: ["0", "−6 nats"], advantage: [number(-scale.advantage), number(scale.advantage)] }[shade];
  const legend = h("div", { class: "scale number", id: "scale" }, parts[0], ramp, parts[1]);
  if (shade === "entropy" && scale.corridors.length) {
    for (const [name, value] of scale.corridors.flatMap(([low, high]) => [["floor", low], ["cap", high]])) {
      const line = h("i", { class: name, title: `${name}: ${number(value)} nats` });
      line.style.left = `${clamp(100 * value / scale.entropy, 0, 100)}%`;
      ramp.append(line);
    }
    legend.append(h("span", { class: "tok below" }, "below"), h("span", { class: "tok above" }, "above"));
  }
  return legend;
}

function showTip(body, at) {
  const span = body.querySelector(`[data-at="${at}"]`);
  for (const other of document.querySelectorAll(".tok.here")) other.classList.remove("here");
  if (!span) {
    $("tip").hidden = true;
    return;
  }
  const { episode, place } = body;
  const [tokens, logprobs, entropies] = episode.tokens[place];
  const [logprob, entropy, advantage] = [logprobs[at], entropies[at], episode.turns[place][8]];
  const words = { above: "above the cap", below: "below the floor", within: "in the corridor" };
  const rows = [
    ["log-prob", logprob == null ? "not known" : `${number(logprob, 3)} (p = ${Math.exp(logprob).toPrecision(2)})`],
    ["entropy", entropy == null ? "not known" : `${number(entropy, 3)} nats`],
    ["corridor", words[position(entropy, episode.n)]],
    ["advantage", advantage == null ? null : signed(advantage, 3)],
  ];
  $("tip").replaceChildren(h("b", {}, `“${oneLine(tokens[at])}”`),
    h("table", {}, rows.filter(([, value]) => value != null).map(([name, value]) => h("tr", {}, h("th", { scope: "row" }, name), h("td", {}, value)))));
  $("tip").hidden = false;
  span.classList.add("here");
  body.at = at;
  const box = span.getClientRects()[0] ?? span.getBoundingClientRect();
  const tip = $("tip").getBoundingClientRect();
  $("tip").style.left = `${clamp(box.left, 8, innerWidth - tip.width - 8)}px`;
  $("tip").style.top = `${box.bottom + tip.height + 10 > innerHeight ? box.top - tip.height - 6 : box.bottom + 8}px`;
}

// After scrolling: with the token that the pointer is still on, or away.
function moveTip() {
  const here = document.querySelector(".tok.here");
  if (here?.matches(":hover")) showTip(here.closest(".said"), Number(here.dataset.at));
  else hideTip();
}

function hideTip() {
  $("tip").hidden = true;
  for (const other of document.querySelectorAll(".tok.here")) other.classList.remove("here");
}

// ------------------------------------------------------------------------------------------------- links, keys, themes

function keyOf(n) {
  const e = episodes;
  const set = e.mode[n] === "train" ? "train" : `eval:${e.panel[n]}`;
  return [e.run[n], set, e.step[n], e.rl_step[n], e.row[n]].map((part) => encodeURIComponent(part ?? "")).join("/");
}

let ownHash = null;

function setHash() {
  const beside = state.beside == null ? "" : `&beside=${keyOf(state.beside)}`;
  ownHash = state.view === "episodes" && state.current != null ? `#episode=${keyOf(state.current)}${beside}` : `#${state.view}`;
  if (location.hash !== ownHash) location.replace(ownHash);
}

function followHash() {
  if (location.hash === ownHash) return;
  const found = /^#episode=([^&]+)(?:&beside=([^&]+))?$/.exec(location.hash);
  if (!found) {
    setView(location.hash === "#episodes" && count ? "episodes" : "curves");
    return;
  }
  const [n, beside] = [keys.get(found[1]), found[2] ? keys.get(found[2]) : null];
  if (n == null) {
    say("The link is to an episode that is not in this page.");
    return;
  }
  setView("episodes");
  open(n, beside ?? null);
}

async function copyLink() {
  try {
    await navigator.clipboard.writeText(location.href);
    toast("The link is copied.");
  } catch {
    toast("The link is in the address bar.");
  }
}

function toast(text) {
  $("toast")?.remove();
  const box = h("div", { id: "toast", role: "status" }, text);
  document.body.append(box);
  setTimeout(() => box.remove(), 3000);
}

function say(text) {
  $("message").textContent = text;
  $("message").hidden = false;
}

function setView(view) {
  if (view === "episodes" && !count) view = "curves";
  const changed = state.view !== view;
  state.view = view;
  for (const name of ["curves", "episodes"]) {
    $(name).hidden = name !== view;
    $(`tab-${name}`).setAttribute("aria-selected", String(name === view));
    $(`tab-${name}`).tabIndex = name === view ? 0 : -1;
  }
  hideTip();
  if (!changed) return;
  if (view === "episodes") {
    drawList();
    scrollToCurrent();
  } else {
    resizeCharts();
  }
  setHash();
}

function resizeCharts() {
  for (const { plot, box, spec } of charts) if (box.clientWidth && box.clientWidth !== plot.width) plot.setSize({ width: box.clientWidth, height: spec.wide ? 230 : 180 });
}

const systemDark = matchMedia("(prefers-color-scheme: dark)");
let chosenTheme = null;

function applyTheme() {
  document.documentElement.dataset.theme = chosenTheme ?? (systemDark.matches ? "dark" : "light");
  if (runs) {
    drawCharts();
    redrawDetail();
  }
}

function toggleTheme() {
  chosenTheme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  try {
    localStorage.setItem("trl-epo-theme", chosenTheme);
  } catch { /* a page from the disk may have no storage: the choice then holds until it is closed */ }
  applyTheme();
}

const KEYS = { j: "next episode", k: "previous episode", "/": "search the texts", c: "beside another episode, or alone again", "?": "this help", Esc: "leave: help, search, comparison", "← →": "from token to token, in a text that has the focus" };

function showHelp() {
  $("help").replaceChildren(
    h("h2", { id: "help-title" }, "Keys and colours"),
    h("dl", {}, Object.entries(KEYS).flatMap(([key, what]) => [h("dt", {}, h("kbd", {}, key)), h("dd", {}, what)])),
    h("h3", {}, "Curves"), h("p", {}, "Drag across a curve or click on it, then “Show them”, to see the episodes of these steps. A click on a name in a legend hides its line."),
    h("h3", {}, "Tokens"), h("p", {}, "The darker a token, the higher its entropy. ", h("span", { class: "tok above" }, "Underlined"), ": above the cap, so the penalty pushes its entropy down. ",
      h("span", { class: "tok below" }, "Dotted"), ": below the floor, so the penalty pushes it up. Point at a token for its values. ",
      "Characters that hide or reorder text are written out, as in ", h("span", { class: "escaped" }, "\\u202e"), "."),
    h("p", { class: "hint" }, h("button", { class: "button", click: () => $("help").close() }, "Close")));
  $("help").showModal();
}

function onKey(event) {
  const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
  if (event.key === "Escape") {
    if ($("help").open) return;
    if (!$("tip").hidden) hideTip();
    else if (typing) event.target.blur();
    else if (state.range) setRange(null);
    else if (state.beside != null) open(state.current, null);
    return;
  }
  if (event.target.classList?.contains("said") && /^Arrow(Left|Right)$/.test(event.key)) {
    const last = event.target.querySelectorAll(".tok").length - 1;
    const at = event.target.at ?? -1;
    showTip(event.target, clamp(at + (event.key === "ArrowRight" ? 1 : -1), 0, last));
    event.preventDefault();
    return;
  }
  if (event.target.role === "tab" && /^Arrow(Left|Right)$/.test(event.key)) {
    setView(state.view === "curves" ? "episodes" : "curves");
    $(`tab-${state.view}`).focus();
    return;
  }
  if (event.target.id === "list" && /^Arrow(Up|Down)$/.test(event.key)) {
    move(event.key === "ArrowDown" ? 1 : -1);
    event.preventDefault();
    return;
  }
  if (typing || $("help").open || event.ctrlKey || event.metaKey || event.altKey) return;
  const actions = {
    j: () => move(1), k: () => move(-1), c: compare, "?": showHelp,
    "/": () => { if (count) { setView("episodes"); $("f-text").focus(); $("f-text").select(); } },
  };
  if (actions[event.key]) {
    event.preventDefault();
    actions[event.key]();
  }
}

function listen() {
  document.addEventListener("keydown", onKey);
  addEventListener("hashchange", followHash);
  addEventListener("resize", () => { resizeCharts(); drawList(); });
  $("list").addEventListener("scroll", drawList, { passive: true });
  $("tab-curves").addEventListener("click", () => setView("curves"));
  $("tab-episodes").addEventListener("click", () => setView("episodes"));
  $("theme").addEventListener("click", toggleTheme);
  $("help-button").addEventListener("click", showHelp);
  $("skip").addEventListener("click", (event) => { event.preventDefault(); $("main").focus(); });
  systemDark.addEventListener("change", applyTheme);
  $("detail").addEventListener("mouseover", (event) => {
    const span = event.target.closest?.("[data-at]");
    if (span) showTip(span.closest(".said"), Number(span.dataset.at));
    else hideTip();
  });
  $("detail").addEventListener("mouseleave", hideTip);
  $("detail").addEventListener("scroll", moveTip, { passive: true });
  $("detail").addEventListener("focusout", hideTip);
}

function notes(data) {
  const lines = [];
  if (count < data.kept) lines.push(`The runs kept ${many(data.kept, "episode")}; the page has a sample of ${count.toLocaleString("en")}, in which every step, panel and outcome occurs.`);
  if (data.with_tokens < count) lines.push(`Tokens with their values are here for ${data.with_tokens.toLocaleString("en")} of ${many(count, "episode")}, the texts for all of them.`);
  for (const run of runs) {
    const name = oneLine(run.name);
    if (!run.logged) lines.push(`${name} has no log: its curves are means over kept episodes.`);
    if (!episodes.run.includes(run.name)) lines.push(`${name} has no kept episodes: only its curves are here.`);
  }
  $("notes").hidden = !lines.length;
  $("notes").replaceChildren(...lines.flatMap((line) => [h("span", {}, line), h("br")]));
}

async function begin() {
  try {
    chosenTheme = localStorage.getItem("trl-epo-theme");
  } catch { /* see toggleTheme */ }
  applyTheme();
  if (typeof DecompressionStream === "undefined") {
    say("This browser is too old for the page: use Chrome 111, Firefox 113, Safari 16.4 or a newer one.");
    return;
  }
  const data = await unpacked("data");
  ({ runs, episodes } = data);
  count = episodes.run.length;
  twoRuns = runs.length === 2;
  keys = new Map();
  for (const n of all().reverse()) keys.set(keyOf(n), n);
  document.title = `${runs.map((run) => oneLine(run.name)).join(" and ")}: training run`;
  $("title").replaceChildren(...runs.map((run, place) => h("span", { title: oneLine(run.name) }, runMark(place), oneLine(run.name))));
  $("num-episodes").textContent = count.toLocaleString("en");
  $("tab-episodes").disabled = !count;
  notes(data);
  inShort();
  drawCharts();
  makeFilters();
  $("detail").replaceChildren(h("p", { class: "empty" }, "Choose an episode in the list, or press ", h("kbd", {}, "j"), ". ", h("kbd", {}, "?"), " tells the keys."));
  applyFilters();
  listen();
  followHash();
  document.documentElement.dataset.ready = "";
  performance.mark("ready");
}

begin().catch((error) => say(`This file is not whole, or the page has a fault: ${printable(error)}`));
