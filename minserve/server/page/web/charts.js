// Everything that is drawn but the lanes: tiles, attainment, iterations, the queue, the replicas.

import { KEPT_MS, lastMinute } from "./state.js";
import { count, duration, el, legend, percent, plural, say, svg } from "./words.js";

// The parts of an iteration from the ground up, with their names; the same colours stand for the same
// tokens in the lanes.
const TOKENS = [
  ["decode", "decodes", (one) => one.decode],
  ["draft", "drafts to verify", (one) => one.draft],
  ["prefill", "prefill", (one) => one.prefill],
  ["best-effort-decode", "best effort: decodes", (one) => one.best_effort_decode + one.best_effort_draft],
  ["best-effort-prefill", "best effort: prefill", (one) => one.best_effort_prefill],
];
const STANDINGS = [["admitted", "admitted"], ["pending", "pending"], ["best_effort", "best effort"]];
const SHORT_MS = 120_000; // the span of lines of attainment while there is no more to show
const NUM_POINTS = 60;
const median = (numbers) => numbers.sort((a, b) => a - b)[numbers.length >> 1];
const taken = (one) => TOKENS.reduce((sum, [, , of]) => sum + of(one), 0);

/** Keep a list's child elements, one for each name, in order; `make` makes a missing one. */
function keyed(parent, names, make) {
  const kept = new Map([...parent.children].map((child) => [child.dataset.name, child]));
  const wanted = names.map((name) => {
    const child = kept.get(name) ?? make(name);
    child.dataset.name = name;
    return child;
  });
  if (wanted.some((child, i) => parent.children[i] !== child) || wanted.length !== parent.children.length) {
    parent.replaceChildren(...wanted);
  }
  return wanted;
}

// --- tiles ---

export function tiles(list, state) {
  const ends = state.classes.flatMap((one) => one.ends);
  const kept = lastMinute(ends, state.now);
  const ever = state.classes.reduce((sum, one) => [sum[0] + one.attained, sum[1] + one.ended], [0, 0]);
  const drafts = state.sum((one) => one.totals.drafts.draft_tokens);
  const asked = state.sum((one) => one.totals.prefix_queries);
  const newest = state.all.flatMap((one) => one.iterations.slice(-60));
  const usage = state.all.length ? Math.max(...state.all.map((one) => one.totals?.kv_usage ?? 0)) : 0;
  const predicted = newest.filter((one) => one.predicted_ms !== null).map((one) => one.predicted_ms);
  const preemptions = state.sum((one) => one.totals.preemptions);
  const shown = [
    ["Promises kept", kept.ended ? percent(kept.attained, kept.ended) : percent(...ever),
      kept.ended ? `${kept.attained} of ${kept.ended} in a minute` : ever[1] ? `${count(ever[0])} of ${count(ever[1])} since the start` : "no request with an SLO yet"],
    ["Output", `${count(Math.round(state.all.reduce((sum, one) => sum + one.rate, 0)))} tokens/s`,
      `${count(state.sum((one) => one.totals.generation_tokens))} since the start`],
    ["Iteration", newest.length ? duration(median(newest.map((one) => one.took_ms))) : "–",
      predicted.length ? `predicted ${duration(median(predicted))}` : newest.length ? "median" : "none yet"],
    ["KV cache", percent(Math.round(usage * 1000), 1000), `in use; ${plural(preemptions, "preemption")}`],
    ["Drafts accepted", percent(state.sum((one) => one.totals.drafts.accepted_tokens), drafts),
      drafts ? `of ${plural(drafts, "token")}` : "nothing was drafted"],
    ["Prefix hits", percent(state.sum((one) => one.totals.prefix_hits), asked),
      asked ? `of ${plural(asked, "prompt token")}` : "no prompt yet"],
  ];
  const boxes = keyed(list, shown.map(([name]) => name), (name) =>
    el("div", {}, el("dt", {}, name), el("dd", { class: "value" }), el("dd", { class: "help" })));
  shown.forEach(([, value, words], i) => {
    const [, big, small] = boxes[i].children;
    const [number, ...unit] = value.split(" ");
    if (big.dataset.text !== value) {
      big.dataset.text = value;
      big.replaceChildren(number, unit.length ? el("small", {}, ` ${unit.join(" ")}`) : "");
    }
    say(small, words);
  });
}

// --- attainment ---

export function attainment(box, state) {
  const classes = state.classes;
  if (!classes.length) {
    if (!box.querySelector(".empty")) {
      box.replaceChildren(el("p", { class: "empty" }, "No request with an SLO has ended yet. Ask for a promise, and it shows here."));
    }
    return;
  }
  if (!box.querySelector("table")) {
    const heads = [["Class"], ["Last 10 min", "line"], ["Last minute", "number"], ["Since the start", "number start"]];
    box.replaceChildren(el("table", { class: "kept-classes" },
      el("thead", {}, el("tr", {}, ...heads.map(([text, kind = ""]) => el("th", { scope: "col", class: kind }, text)))),
      el("tbody")));
  }
  const oldest = Math.min(...classes.flatMap((one) => one.ends.map((end) => end.at)));
  const span = oldest < state.now - SHORT_MS ? KEPT_MS : SHORT_MS;
  say(box.querySelector("th.line"), `Last ${span / 60_000} min`);
  const rows = keyed(box.querySelector("tbody"), classes.map((one) => one.name), (name) =>
    el("tr", {}, el("th", { scope: "row" }, name), el("td", { class: "line" }), el("td", { class: "number big" }),
      el("td", { class: "number start" })));
  classes.forEach((one, i) => {
    const [, line, minute, ever] = rows[i].children;
    const kept = lastMinute(one.ends, state.now);
    line.replaceChildren(trend(one, state.now, span));
    say(minute, kept.ended ? percent(kept.attained, kept.ended) : "–");
    minute.title = `${kept.attained} of ${kept.ended}`;
    say(ever, `${count(one.attained)} of ${count(one.ended)}`);
  });
}

/** A line of the share within the minute before each point; it has gaps where nothing ended. */
function trend(one, now, span) {
  const [width, height] = [300, 32];
  const x = (at) => width * (1 - (now - at) / span);
  let [path, pen, last, lone] = ["", false, null, ""];
  for (let point = 0; point <= NUM_POINTS; point += 1) {
    const at = now - span * (1 - point / NUM_POINTS);
    const { ended, attained } = lastMinute(one.ends, at);
    if (ended) {
      const y = 3 + (height - 6) * (1 - attained / ended);
      path += `${pen ? "L" : "M"}${x(at).toFixed(1)} ${y.toFixed(1)}`;
      if (!pen) lone = `h0.1`;
      last = [x(at), y];
    } else if (pen && lone) lone = "";
    pen = Boolean(ended);
  }
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", height, width: "100%",
    role: "img", "aria-label": `line of the share of ${one.name} that was kept` },
  ...[3, height / 2, height - 3].map((y) => svg("path", { class: "grid", d: `M0 ${y}H${width}` })),
  svg("path", { class: "trend", d: path + lone, "vector-effect": "non-scaling-stroke" }));
  picture.dataset.points = last ? "yes" : "no";
  return picture;
}

// --- iterations ---

/** A round number at or above another, for the top of an axis. */
function roundUp(number) {
  const power = 10 ** Math.floor(Math.log10(Math.max(number, 1)));
  return [1, 1.5, 2, 3, 4, 5, 6, 8, 10].map((factor) => factor * power).find((one) => one >= number);
}

export function iterations(parts, state, chosen) {
  const { tokens, times, tokenLegend, timeLegend, words, table } = parts;
  const all = (state.replicas.get(chosen) ?? state.all[0])?.iterations ?? [];
  if (!all.length) {
    if (!tokens.children.length) tokens.replaceChildren(el("p", { class: "empty" }, "No iteration yet."));
    return;
  }
  if (!tokenLegend.children.length) {
    legend(tokenLegend, [["", "Tokens:"], ...TOKENS]);
    legend(timeLegend, [["", "Time:"], ["actual", "taken"], ["predicted", "predicted", "M0 6H12"]]);
  }
  const width = Math.max(240, tokens.clientWidth);
  const shown = all.slice(-Math.floor((width - LEFT) / 9));
  tokens.replaceChildren(tokenBars(shown, width));
  times.replaceChildren(timeBars(shown, width));
  const last = shown.at(-1);
  const foreseen = last.predicted_ms === null ? "" : `, predicted ${duration(last.predicted_ms)}`;
  say(words, `The last ${shown.length}, the newest at the right: ${plural(taken(last), "token")} of ${plural(last.sequences, "request")} in ${duration(last.took_ms)}${foreseen}.`);
  if (table.open) tabulate(table.lastElementChild, shown);
}

const LEFT = 52; // of the bars, in CSS pixels: before them are the numbers of the axis

/** Where each bar stands, and how wide it is. */
function places(shown, width) {
  const pitch = (width - LEFT) / Math.max(shown.length, 24);
  const bar = Math.max(2, Math.min(14, pitch - 2));
  return [shown.map((_, i) => width - pitch * (shown.length - i) + (pitch - bar) / 2), bar];
}

/** A picture of bars with the numbers of its axis. */
function picture(width, high, label, top, paths) {
  const rule = (y, text) => [svg("path", { class: "grid", d: `M${LEFT} ${y}H${width}` }),
    svg("text", { x: LEFT - 6, y: y + 4, "text-anchor": "end" }, text)];
  return svg("svg", { width, height: high + 14, viewBox: `0 -7 ${width} ${high + 14}`, role: "img", "aria-label": label },
    ...rule(0, top), ...rule(high, "0"),
    ...Object.entries(paths).filter(([, d]) => d).map(([kind, d]) => svg("path", { class: kind, d })));
}

function tokenBars(shown, width) {
  const high = 120;
  const [xs, bar] = places(shown, width);
  const most = roundUp(Math.max(...shown.map(taken)));
  const paths = Object.fromEntries(TOKENS.map(([kind]) => [kind, ""]));
  shown.forEach((one, i) => {
    let y = high;
    for (const [kind, , of] of TOKENS) {
      if (!of(one)) continue;
      const up = Math.max(1.5, (high * of(one)) / most); // a little is seen too
      paths[kind] += `M${xs[i].toFixed(1)} ${y.toFixed(1)}v${(-up).toFixed(1)}h${bar}v${up.toFixed(1)}z`;
      y -= up;
    }
  });
  return picture(width, high, "Bars of the newest iterations: their tokens by kind", count(most), paths);
}

function timeBars(shown, width) {
  const high = 64;
  const [xs, bar] = places(shown, width);
  const longest = roundUp(Math.max(...shown.map((one) => Math.max(one.took_ms, one.predicted_ms ?? 0))));
  const paths = { actual: "", predicted: "" };
  shown.forEach((one, i) => {
    const up = (high * one.took_ms) / longest;
    paths.actual += `M${xs[i].toFixed(1)} ${high}v${(-up).toFixed(1)}h${bar}v${up.toFixed(1)}z`;
    if (one.predicted_ms !== null) {
      paths.predicted += `M${(xs[i] - 1).toFixed(1)} ${(high * (1 - one.predicted_ms / longest)).toFixed(1)}h${bar + 2}`;
    }
  });
  return picture(width, high, "Bars of the newest iterations: time taken, with lines where it was predicted", duration(longest), paths);
}

function tabulate(box, shown) {
  const heads = ["Tokens", ...TOKENS.map(([, text]) => text), "requests", "taken", "predicted"];
  const rows = shown.slice(-20).reverse().map((one) => [count(taken(one)), ...TOKENS.map(([, , of]) => count(of(one))),
    count(one.sequences), duration(one.took_ms), duration(one.predicted_ms)]);
  box.replaceChildren(el("table", {},
    el("thead", {}, el("tr", {}, ...heads.map((text) => el("th", { scope: "col", class: "number" }, text)))),
    el("tbody", {}, ...rows.map((row) => el("tr", {}, ...row.map((text) => el("td", { class: "number" }, text)))))));
}

// --- queue and replicas ---

export function queue(box, state) {
  if (!box.children.length) {
    for (const name of ["running", "waiting"]) {
      box.append(el("div", { class: "bar-line", "data-name": name }, el("span", {}, name === "running" ? "Running" : "Waiting"),
        el("span", { class: "sum" }), svg("svg", { viewBox: "0 0 100 10", preserveAspectRatio: "none", role: "img" })));
    }
    const list = el("ul", { class: "legend" });
    legend(list, STANDINGS);
    box.append(list);
  }
  const lines = ["running", "waiting"].map((name) => [name, state.standing(name)]);
  const most = Math.max(8, ...lines.map(([, counts]) => counts.admitted + counts.pending + counts.best_effort));
  lines.forEach(([, counts], i) => {
    const [, sum, picture] = box.children[i].children;
    say(sum, count(counts.admitted + counts.pending + counts.best_effort));
    let x = 0;
    const parts = [svg("rect", { class: "track", width: 100, height: 10 })];
    for (const [kind] of STANDINGS) {
      const wide = (100 * counts[kind]) / most;
      if (wide) parts.push(svg("rect", { class: kind, x, width: wide, height: 10 }));
      x += wide;
    }
    picture.setAttribute("aria-label", STANDINGS.map(([kind, text]) => `${counts[kind]} ${text}`).join(", "));
    picture.replaceChildren(...parts);
  });
}

export function replicas(box, state) {
  const all = state.all;
  box.hidden = all.length < 2;
  if (box.hidden) return;
  const rows = keyed(box.querySelector("ul"), all.map((one) => one.name), (name) =>
    el("li", {}, el("span", {}, `Replica ${name}`), el("span", { class: "state" }), el("span", { class: "help" })));
  const sum = (counts) => Object.values(counts).reduce((total, one) => total + one, 0);
  all.forEach((one, i) => {
    const [, name, words] = rows[i].children;
    say(name, one.state);
    name.classList.toggle("down", one.state !== "up");
    say(words, `${sum(one.running)} running, ${sum(one.waiting)} waiting, KV ${percent(Math.round((one.totals?.kv_usage ?? 0) * 1000), 1000)}`);
  });
}
