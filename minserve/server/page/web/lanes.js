// A lane for each request: waiting, prefill chunks, tokens and how they stood to their deadlines.

import { duration, el, legend, plural, say, slackWords, svg } from "./words.js";

const MOST_SHOWN = 16;
const HIGH = 22;
const MIDDLE = HIGH / 2;
const OUTCOMES = { best_effort: "not promised", rejected: "refused", failed: "failed" };

const LEGEND = [
  ["wait", "waiting", "M0 6H12"], ["prefill", "prefill chunk"], ["decode", "tokens in time", "M1 1h2v10h-2zM5 1h2v10h-2zM9 1h2v10h-2z"],
  ["best-effort-decode", "tokens of best effort", "M1 1h2v10h-2zM5 1h2v10h-2zM9 1h2v10h-2z"],
  ["late", "tokens late", "M1 0h3v12h-3zM7 0h3v12h-3z"], ["due", "first or last token due", "M6 0V12M3 0H9"], ["gone", "preempted", "M1 1L11 11M11 1L1 11"],
];

export function lanes(parts, state, spanMs) {
  const { list, legendList, words } = parts;
  if (!legendList.children.length) legend(legendList, LEGEND);
  const all = state.lanes;
  if (!all.length) {
    if (!list.querySelector(".empty")) list.replaceChildren(el("li", { class: "empty" }, "No request yet."));
    say(words, "");
    return;
  }
  // Where nothing is under way, time stands still, so that the last requests stay in sight.
  const isLive = all.some((lane) => lane.ended_ms === null);
  const until = isLive ? state.now : Math.max(...all.map((lane) => lane.ended_ms + lane.replica.offset)) + spanMs / 100;
  const isSeen = (lane) => lane.ended_ms === null || lane.ended_ms + lane.replica.offset > until - spanMs;
  const shown = all.filter(isSeen).slice(0, MOST_SHOWN);
  const kept = new Map([...list.children].map((row) => [row.dataset.id, row]));
  const rows = shown.map((lane) => {
    const id = `${lane.replica.name} ${lane.id}`;
    return kept.get(id) ?? make(id, lane, state.all.length > 1);
  });
  const axis = kept.get("axis") ?? el("li", { class: "axis", "data-id": "axis", "aria-hidden": "true" },
    el("span"), el("span"), el("span", { class: "lane" }), el("span"));
  const wanted = [...rows, axis];
  if (wanted.length !== list.children.length || wanted.some((row, i) => list.children[i] !== row)) list.replaceChildren(...wanted);
  // Only now has each its width.
  rows.forEach((row, i) => update(row, shown[i], until, spanMs, state.now));
  axis.children[2].replaceChildren(scale(axis.children[2].clientWidth, spanMs, isLive));
  const waiting = state.standing("waiting");
  const underWay = ["admitted", "pending", "best_effort"].reduce((sum, name) => sum + waiting[name] + state.standing("running")[name], 0);
  const live = shown.filter((lane) => lane.ended_ms === null).length;
  say(words, underWay > live ? `${plural(underWay - live, "request")} under way without a lane here.` : "");
}

function make(id, lane, hasReplicas) {
  const [request, index] = lane.id.split("/");
  const short = request.slice(0, 6) + (index === undefined ? "" : `/${index}`);
  return el("li", { "data-id": id },
    el("code", { title: lane.id }, hasReplicas ? `${lane.replica.name}: ${short}` : short),
    el("span", { class: "slo" }, lane.class ?? "no SLO"),
    el("span", { class: "lane" }, svg("svg", { role: "img" })),
    el("span", { class: "said" }));
}

function update(row, lane, until, spanMs, now) {
  const [, , holder, said] = row.children;
  const picture = holder.firstElementChild;
  const [words, isMissed] = standingOf(lane, now);
  say(said, words);
  said.classList.toggle("missed", isMissed);
  // What has ended is drawn anew only while its time moves.
  const seen = `${lane.state} ${lane.ended_ms} ${until} ${spanMs} ${holder.clientWidth} ${lane.marks.length}`;
  if (picture.dataset.seen === seen) return;
  picture.dataset.seen = seen;
  picture.setAttribute("aria-label", lifeOf(lane));
  draw(picture, lane, holder.clientWidth, until, spanMs);
}

/** What the lane says at its right (how its tightest token stood to its deadline), and whether its promise was missed. */
function standingOf(lane, now) {
  const slack = worstSlack(lane);
  const ttft = lane.first_token_ms === null ? null : lane.first_token_ms - lane.arrival_ms;
  const isMissed = slack !== null && slack < 0;
  const first = ttft === null ? "" : `TTFT ${duration(ttft)}`;
  if (lane.ended_ms === null) {
    if (ttft === null && lane.ttft_due_ms !== null && lane.ttft_due_ms + lane.replica.offset < now) {
      return [`first token ${duration(now - lane.ttft_due_ms - lane.replica.offset)} late`, true];
    }
    if (lane.state === "waiting" && !lane.marks.length) {
      return [`waiting ${duration(Math.max(0, now - lane.arrival_ms - lane.replica.offset))}`, false];
    }
    if (ttft === null) return [lane.state === "waiting" ? "waiting again" : "prefill", isMissed];
    return [[first, slack === null ? plural(lane.output_tokens, "token") : slackWords(slack)].join(", "), isMissed];
  }
  if (lane.outcome === "attained") return [[first, slack === null ? "" : slackWords(slack)].filter(Boolean).join(", "), false];
  if (lane.outcome !== null) {
    return [[OUTCOMES[lane.outcome] ?? first, isMissed ? slackWords(slack) : ""].filter(Boolean).join(", "), true];
  }
  const how = { abort: "left", error: "failed" }[lane.finish_reason];
  return [[first, how ?? plural(lane.output_tokens, "token")].filter(Boolean).join(", "), false];
}

function worstSlack(lane) {
  let worst = null;
  for (const [kind, , , , slack] of lane.marks) {
    if (kind === "output" && slack !== null && (worst === null || slack < worst)) worst = slack;
  }
  return worst;
}

/** The lane in words, for who does not see it. */
function lifeOf(lane) {
  const chunks = lane.marks.filter(([kind]) => kind === "prefill").length;
  const late = lane.marks.filter(([, , , , slack]) => slack !== null && slack < 0).length;
  const waited = lane.started_ms === null ? "not started" : `started after ${duration(lane.started_ms - lane.arrival_ms)}`;
  return [lane.state, waited, `prompt of ${lane.prompt_tokens} tokens in ${plural(chunks, "chunk")}`,
    `${lane.output_tokens} output tokens`, late ? "some late" : "none late", plural(lane.preempted_ms.length, "preemption")].join(", ");
}

function draw(picture, lane, width, until, spanMs) {
  const offset = lane.replica.offset;
  const x = (ms) => width * (1 - (until - ms - offset) / spanMs);
  const clamp = (value) => Math.max(0, Math.min(width, value));
  const paths = { base: "", wait: "", prefill: "", "best-effort-prefill": "", decode: "", "best-effort-decode": "", late: "", due: "", gone: "" };
  const line = (kind, from, to) => {
    if (to >= 0 && from <= width) paths[kind] += `M${clamp(from).toFixed(1)} ${MIDDLE}H${clamp(Math.max(to, from)).toFixed(1)}`;
  };
  const box = (kind, from, to, half) => {
    const [left, right] = [clamp(from), clamp(to)];
    if (to < 0 || from > width) return;
    paths[kind] += `M${left.toFixed(1)} ${MIDDLE - half}H${Math.max(right, left + 1).toFixed(1)}V${MIDDLE + half}H${left.toFixed(1)}z`;
  };
  const isLeftOver = lane.standing === "best_effort";
  const end = lane.ended_ms === null ? until - offset : lane.ended_ms;
  line("base", x(lane.arrival_ms), x(end));
  line("wait", x(lane.arrival_ms), x(lane.started_ms ?? end));
  for (const [kind, from, to, tokens, slack] of lane.marks) {
    if (kind === "prefill") box(isLeftOver ? "best-effort-prefill" : "prefill", x(from), x(to), 5);
    else if (slack !== null && slack < 0) box("late", x(from) - 1, x(to) + 1, 10);
    else if (to > from) box(isLeftOver ? "best-effort-decode" : "decode", x(from), x(to), 5);
    else box(isLeftOver ? "best-effort-decode" : "decode", x(from) - 0.75, x(from) + 0.75, tokens > 1 ? 7 : 5);
  }
  for (const at of [lane.ttft_due_ms, lane.finish_due_ms]) {
    const due = at === null ? -1 : x(at);
    if (due >= 0 && due <= width) paths.due += `M${due.toFixed(1)} 2V${HIGH - 2}M${(due - 3).toFixed(1)} 2h6`;
  }
  for (const at of lane.preempted_ms) {
    const place = x(at);
    if (place >= 0 && place <= width) paths.gone += `M${(place - 4).toFixed(1)} ${MIDDLE - 4}l8 8m0 -8l-8 8`;
  }
  picture.replaceChildren(...Object.entries(paths).filter(([, d]) => d).map(([kind, d]) => svg("path", { class: kind, d })));
}

/** The times under the lanes. */
function scale(width, spanMs, isLive) {
  const texts = [0, 1, 2].map((part) => {
    const ago = (spanMs * (2 - part)) / 2;
    const text = ago === 0 ? (isLive ? "now" : "the last end") : `−${ago / 1000} s`;
    return svg("text", { x: (width * part) / 2, y: 12, "text-anchor": ["start", "middle", "end"][part] }, text);
  });
  return svg("svg", {}, ...texts);
}
