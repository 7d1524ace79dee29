// What the feed has told so far, in bounded memory. docs/page.md describes the frames.

const MOST_ITERATIONS = 240;
const MOST_LANES = 60;
export const KEPT_MS = 600_000; // of ends: as long as the lines of attainment
const RATE_MS = 5_000;

class Replica {
  constructor(name) {
    this.name = name;
    this.state = "";
    this.totals = null;
    this.forget();
  }

  forget() {
    this.iterations = [];
    this.lanes = new Map();
    this.ends = new Map();
    this.waiting = {};
    this.running = {};
    this.isTold = false;
    this.offset = null; // of the page's clock before the replica's, in ms
    this.produced = []; // [page's time, tokens so far]
  }

  take(told, now) {
    this.state = told.state;
    this.totals = told.totals;
    const news = told.activity;
    if (news) this.hear(news, now);
    this.produced.push([now, told.totals.generation_tokens]);
    while (this.produced.length > 2 && this.produced[0][0] < now - RATE_MS) this.produced.shift();
  }

  hear(news, now) {
    if (news.is_whole) this.forget();
    this.isTold = true;
    // The least delay is nearest to the truth; clocks may still drift apart slowly.
    const offset = now - news.now_ms;
    if (this.offset === null || offset < this.offset) this.offset = offset;
    else this.offset += 0.02 * (offset - this.offset);
    this.waiting = news.waiting;
    this.running = news.running;
    this.iterations = [...this.iterations, ...news.iterations].slice(-MOST_ITERATIONS);
    const told = new Set();
    for (const lane of news.lanes) {
      told.add(lane.id);
      const old = this.lanes.get(lane.id)?.marks ?? [];
      lane.marks = [...old.slice(0, lane.first_mark), ...lane.marks];
      lane.replica = this;
      this.lanes.set(lane.id, lane);
    }
    for (const [id, lane] of this.lanes) {
      // A request that is gone without an end runs elsewhere now.
      if (lane.ended_ms === null && !told.has(id)) this.lanes.delete(id);
    }
    for (const [id, lane] of this.lanes) {
      if (this.lanes.size <= MOST_LANES) break;
      if (lane.ended_ms !== null) this.lanes.delete(id);
    }
    for (const end of news.ends) this.ends.set(`${end.since_ms} ${end.class}`, end);
    for (const [id, end] of this.ends) if (end.since_ms < news.now_ms - KEPT_MS - 60_000) this.ends.delete(id);
  }

  /** Output tokens per second over the last seconds. */
  get rate() {
    const [first, last] = [this.produced[0], this.produced.at(-1)];
    if (!first || last[0] - first[0] < 200) return 0;
    return Math.max(0, (1000 * (last[1] - first[1])) / (last[0] - first[0]));
  }
}

export class State {
  constructor() {
    this.about = null;
    this.replicas = new Map();
    this.now = 0;
  }

  take(frame, now) {
    this.now = now;
    if (frame.about) this.about = frame.about;
    const names = new Set(frame.replicas.map((one) => one.replica));
    for (const name of this.replicas.keys()) if (!names.has(name)) this.replicas.delete(name);
    for (const told of frame.replicas) {
      if (!this.replicas.has(told.replica)) this.replicas.set(told.replica, new Replica(told.replica));
      this.replicas.get(told.replica).take(told, now);
    }
  }

  get all() {
    return [...this.replicas.values()];
  }

  sum(of) {
    return this.all.reduce((sum, one) => sum + (one.totals ? of(one) : 0), 0);
  }

  /** Sequences that run or wait, by standing. */
  standing(which) {
    const sums = { admitted: 0, pending: 0, best_effort: 0 };
    for (const one of this.all) for (const name in sums) sums[name] += one[which][name] ?? 0;
    return sums;
  }

  /** All lanes, those under way first, then the newest first. */
  get lanes() {
    const all = this.all.flatMap((one) => [...one.lanes.values()]);
    const when = (lane) => lane.arrival_ms + lane.replica.offset;
    return all.sort((a, b) => (a.ended_ms === null ? 0 : 1) - (b.ended_ms === null ? 0 : 1) || when(b) - when(a));
  }

  /** By class: [{at, ended, attained}] in the page's time, and the totals since the start. */
  get classes() {
    const found = new Map();
    const of = (name) => {
      if (!found.has(name)) found.set(name, { name, ends: [], ended: 0, attained: 0 });
      return found.get(name);
    };
    for (const one of this.all) {
      for (const total of one.totals?.classes ?? []) {
        of(total.name).ended += total.ended;
        of(total.name).attained += total.attained;
      }
      for (const end of one.ends.values()) of(end.class).ends.push({ ...end, at: end.since_ms + one.offset });
    }
    return [...found.values()].sort((a, b) => a.name.localeCompare(b.name));
  }
}

/** Ended and attained within the minute before a time. */
export function lastMinute(ends, at) {
  let [ended, attained] = [0, 0];
  for (const one of ends) {
    if (one.at <= at && one.at > at - 60_000) {
      ended += one.ended;
      attained += one.attained;
    }
  }
  return { ended, attained };
}
