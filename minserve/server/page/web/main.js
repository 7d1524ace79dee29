// The page's wires: the feed into the state, the state into pictures.

import { attainment, iterations, queue, replicas, tiles } from "./charts.js";
import { Chat } from "./chat.js";
import { Feed, key } from "./feed.js";
import { lanes } from "./lanes.js";
import { State } from "./state.js";
import { el, say } from "./words.js";

const $ = (id) => document.getElementById(id);
const CALM_MS = 1_000; // between two pictures where less motion is wanted
const calm = matchMedia("(prefers-reduced-motion: reduce)");

const state = new State();
const chat = new Chat({
  form: $("chat"), list: $("turns"), prompt: $("prompt"), promptLabel: $("prompt-label"), promise: $("promise"), most: $("most"),
  own: $("own"), ownTtft: $("own-ttft"), ownTpot: $("own-tpot"), help: $("promise-help"), send: $("send"), stop: $("stop"),
  clear: $("clear"), status: $("chat-status"),
});

let drawn = 0;
let isDue = false;

/** Draw at the next moment for it, at most once a second where less motion is wanted. */
function draw() {
  if (isDue) return;
  isDue = true;
  const wait = calm.matches ? Math.max(0, drawn + CALM_MS - performance.now()) : 0;
  setTimeout(() => requestAnimationFrame(() => {
    isDue = false;
    drawn = performance.now();
    tiles($("tiles"), state);
    attainment($("attainment"), state);
    iterations({
      tokens: $("iteration-tokens"), times: $("iteration-times"), tokenLegend: $("token-legend"), timeLegend: $("time-legend"),
      words: $("iterations-words"), table: $("iterations-table"),
    }, state, $("replica").value);
    queue($("queue"), state);
    replicas($("replicas"), state);
    lanes({ list: $("lanes"), legendList: $("lane-legend"), words: $("lanes-words") }, state, 1000 * Number($("span").value));
  }), wait);
}

function chooseReplica() {
  const names = state.all.map((one) => one.name);
  $("choice").hidden = names.length < 2;
  if (names.join() === [...$("replica").options].map((one) => one.value).join()) return;
  const before = $("replica").value;
  $("replica").replaceChildren(...names.map((name) => el("option", { value: name }, name)));
  if (names.includes(before)) $("replica").value = before;
}

function told(frame) {
  if (document.body.dataset.ready === "no") {
    location.reload(); // the page was made before there was a model to tell of
    return;
  }
  state.take(frame, performance.now());
  if (frame.about) {
    chat.meet(frame.about);
    say($("serves"), `It serves ${frame.about.model}.`);
  }
  $("live").hidden = false;
  chooseReplica();
  draw();
}

const STANDS = {
  connecting: () => "Connecting",
  live: () => "Live",
  lost: (seconds) => (seconds > 1 ? `No connection; next try in ${seconds} s` : "No connection; trying again"),
  paused: () => "Paused",
  loading: () => "The model is still loading",
  full: () => "Too many look at this page; trying again",
  key: () => "An API key is needed",
};

function stands(how, more) {
  const pill = $("connection");
  // Between two tries nothing is said, so that nothing is read out again and again.
  if (how === "connecting" && pill.classList.contains("lost")) return;
  pill.hidden = false;
  pill.className = `connection ${how === "live" ? "live" : ["lost", "full"].includes(how) ? "lost" : ""}`;
  say(pill, STANDS[how](more));
  $("forget").hidden = !key.get();
  if (how === "live") $("key-form").hidden = true;
  if (how !== "key") return;
  $("live").hidden = true;
  $("key-form").hidden = false;
  say($("key-problem"), more ? "That is not a key of this server." : "");
  if (more) $("key").focus();
}

const feed = new Feed(told, stands);
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key.set($("key").value.trim());
  $("key").value = "";
  feed.restart();
});
$("forget").firstElementChild.addEventListener("click", () => {
  key.forget();
  chat.clear();
  feed.restart();
});
for (const id of ["replica", "span"]) $(id).addEventListener("change", draw);
$("iterations-table").addEventListener("toggle", draw);
new ResizeObserver(draw).observe($("live"));
feed.run();
