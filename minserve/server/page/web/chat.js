// The chat box: asks this server, and shows what it promised and kept.

import { authorization, events, problemOf } from "./feed.js";
import { duration, el, plural, say, svg } from "./words.js";

const MOST_TURNS = 20;
const MOST_SHOWN_CHARS = 200_000;
const OWN = "own";

/** What a class promises, in words. */
function classWords(one) {
  const of = (ms, slowdown) => (ms !== null ? duration(ms) : slowdown !== null ? `${slowdown}\u00d7 what an idle device takes` : null);
  const [first, each] = [of(one.ttft_ms, one.ttft_slowdown), of(one.tpot_ms, one.tpot_slowdown)];
  const all = one.finish_ms === null ? null : duration(one.finish_ms);
  return [first && `first token within ${first}`, each && `then each within ${each}`, all && `the whole answer within ${all}`]
    .filter(Boolean).join(", ");
}

export class Chat {
  constructor(parts) {
    this.parts = parts;
    this.about = null;
    this.abort = null;
    this.turns = []; // [{asked, answer}]
    const { form, stop, clear, promise, prompt } = parts;
    form.addEventListener("submit", (event) => (event.preventDefault(), this.send()));
    stop.addEventListener("click", () => this.abort?.abort());
    clear.addEventListener("click", () => this.clear());
    promise.addEventListener("change", () => this.explain());
    prompt.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.send();
    });
  }

  /** Take what the server says of itself; again after each connection. */
  meet(about) {
    if (JSON.stringify(this.about) === JSON.stringify(about)) return;
    this.about = about;
    const { promise, promptLabel, prompt } = this.parts;
    const before = promise.value;
    const standard = about.default_class ? `the server's: ${about.default_class}` : "none: best effort";
    promise.replaceChildren(el("option", { value: "" }, standard),
      ...about.classes.map((one) => el("option", { value: one.name }, one.name)), el("option", { value: OWN }, "my own numbers"));
    promise.value = before || (about.classes.some((one) => one.name === "chatbot") ? "chatbot" : "");
    if (!about.chat) {
      say(promptLabel, "Text to continue");
      if (prompt.value === prompt.defaultValue) prompt.value = "The capital of France is";
    }
    this.explain();
  }

  explain() {
    const { promise, own, help } = this.parts;
    own.hidden = promise.value !== OWN;
    for (const input of own.querySelectorAll("input")) input.disabled = own.hidden;
    const chosen = this.about?.classes.find((one) => one.name === promise.value);
    say(help, chosen ? classWords(chosen) : "");
  }

  clear() {
    this.abort?.abort();
    this.turns = [];
    this.parts.list.replaceChildren();
    this.parts.prompt.focus();
  }

  body(asked) {
    const { promise, most, ownTtft, ownTpot } = this.parts;
    const body = { max_tokens: Number(most.value), temperature: 0, stream: true, stream_options: { include_usage: true } };
    if (this.about.chat) {
      const before = this.turns.flatMap((turn) => [{ role: "user", content: turn.asked }, { role: "assistant", content: turn.answer }]);
      body.messages = [...before, { role: "user", content: asked }];
    } else body.prompt = asked;
    if (promise.value === OWN) body.slo = { ttft_ms: Number(ownTtft.value), tpot_ms: Number(ownTpot.value) };
    else if (promise.value) body.slo = promise.value;
    return body;
  }

  async send() {
    const { form, list, prompt, send, stop, status } = this.parts;
    if (this.abort || !this.about || !form.reportValidity()) return;
    const asked = prompt.value;
    const view = new Turn(asked);
    list.append(view.element);
    while (list.children.length > MOST_TURNS) list.firstElementChild.remove();
    this.abort = new AbortController();
    [send.disabled, stop.disabled] = [true, false];
    say(status, "Asked.");
    list.scrollTop = list.scrollHeight;
    try {
      await this.stream(asked, view, this.abort.signal);
      view.finish();
    } catch (error) {
      if (this.abort.signal.aborted) view.finish("Stopped.");
      else view.fail(error.message);
    }
    if (view.answer && view.element.isConnected) {
      this.turns = [...this.turns, { asked, answer: view.answer }].slice(-MOST_TURNS);
      prompt.value = "";
    }
    this.abort = null;
    [send.disabled, stop.disabled] = [false, true];
    say(status, view.summary);
    list.scrollTop = list.scrollHeight;
    prompt.focus({ preventScroll: true });
  }

  async stream(asked, view, signal) {
    const path = this.about.chat ? "v1/chat/completions" : "v1/completions";
    const response = await fetch(path, {
      method: "POST", signal, body: JSON.stringify(this.body(asked)),
      headers: { "Content-Type": "application/json", ...authorization() },
    });
    if (!response.ok) throw new Error(await problemOf(response));
    const { list } = this.parts;
    for await (const data of events(response)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      const isAtEnd = list.scrollHeight - list.scrollTop - list.clientHeight < 40;
      for (const choice of chunk.choices) view.add(choice.delta?.content ?? choice.text ?? "");
      if (chunk.usage) view.usage = chunk.usage;
      if (isAtEnd) list.scrollTop = list.scrollHeight;
    }
    throw new Error("the stream broke off");
  }
}

/** One question, its answer as it comes, and how it was served. */
class Turn {
  constructor(asked) {
    this.began = performance.now();
    this.first = this.last = null;
    this.num = 0;
    this.answer = "";
    this.usage = null;
    this.summary = "";
    this.text = el("p", { class: "answer" });
    this.kept = el("div", { class: "kept" });
    this.element = el("div", { class: "turn" }, el("p", { class: "asked" }, asked), this.text, this.kept);
  }

  add(text) {
    const now = performance.now();
    this.first ??= now;
    this.last = now;
    this.num += 1;
    if (this.answer.length < MOST_SHOWN_CHARS) {
      this.answer += text;
      this.text.append(text);
    }
    this.kept.replaceChildren(el("span", { class: "all help" }, this.measured()));
  }

  /** What this browser has measured: the network is in it. */
  measured() {
    if (this.first === null) return "";
    const each = this.num > 1 ? `, then ${duration((this.last - this.first) / (this.num - 1))} per token` : "";
    return `First token after ${duration(this.first - this.began)}${each}, measured here`;
  }

  finish(how = "") {
    const slo = this.usage?.slo;
    if (!slo) {
      this.summary = [how, this.measured()].filter(Boolean).join(" ");
      this.kept.replaceChildren(el("span", { class: "all help" }, this.summary + (this.usage ? "; nothing was promised." : "")));
      return;
    }
    const verdict = slo.attained ? "Kept" : "Missed";
    const was = slo.admitted ? "promised" : "not promised, served as best effort";
    const tokens = plural(this.usage.completion_tokens, "token");
    const finish = slo.targets.finish_ms ?? null;
    this.kept.replaceChildren(
      el("span", { class: `all ${slo.attained ? "ok" : "missed"}` }, `${verdict}: ${slo.class}, ${was}, ${tokens}`),
      ...gauge("First token", slo.ttft_ms, slo.targets.ttft_ms), ...gauge("Per token", slo.mean_tpot_ms, slo.targets.tpot_ms),
      ...(finish === null ? [] : gauge("Last token", slo.finish_ms, finish)));
    const of = (got, due) => `${duration(got)}${due === null ? "" : ` of ${duration(due)}`}`;
    this.summary = `${verdict}. First token ${of(slo.ttft_ms, slo.targets.ttft_ms)}, per token ${of(slo.mean_tpot_ms, slo.targets.tpot_ms)}`
      + `${finish === null ? "" : `, last token ${of(slo.finish_ms, finish)}`}.`;
  }

  fail(message) {
    this.summary = `It failed: ${message}`;
    this.kept.replaceChildren(el("span", { class: "all missed" }, message));
  }
}

/** A bar of what was taken, with a line where the target is. */
function gauge(name, got, due) {
  const isLate = due !== null && got > due;
  const most = Math.max(got ?? 0, due ?? 0) * 1.05 || 1;
  const picture = svg("svg", { class: "gauge", viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" },
    svg("rect", { class: "track", width: 100, height: 10 }),
    svg("rect", { class: isLate ? "late" : "decode", width: (100 * (got ?? 0)) / most, height: 10 }));
  if (due !== null) picture.append(svg("path", { class: "due", d: `M${(100 * due) / most} -2V12`, "vector-effect": "non-scaling-stroke" }));
  return [el("span", { class: "label" }, name), picture,
    el("span", { class: isLate ? "missed" : "ok" }, due === null ? duration(got) : `${duration(got)} of ${duration(due)}`)];
}
