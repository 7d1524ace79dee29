// The feed of the server: frames by server-sent events, read by fetch, since EventSource sends no key.

const KEY = "minserve-api-key";
const SILENCE_MS = 10_000; // without a frame for so long the connection counts as lost
const LONGEST_WAIT_MS = 8_000;
const MOST_CHARS = 8 * 2 ** 20; // of one frame

/** The API key of this tab; an empty text without one. */
export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

export const authorization = () => (key.get() ? { Authorization: `Bearer ${key.get()}` } : {});

/** Yield the data of each event of a response. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      rest += value;
      if (rest.length > MOST_CHARS) throw new Error("an event is too long");
      const parts = rest.split("\n\n");
      rest = parts.pop();
      for (const part of parts) if (part.startsWith("data: ")) yield part.slice(6);
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** The message of an error of OpenAI's form, or the status where there is none. */
export async function problemOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status}`;
  }
}

/**
 * Keeps the feed open while the page is seen.
 *
 * told: called with each frame.
 * stands: called with "connecting", "live", "lost", "paused", "loading", "full" or "key", and for
 * "lost" the seconds until the next try, for "key" whether one was given and is wrong.
 */
export class Feed {
  constructor(told, stands) {
    this.told = told;
    this.stands = stands;
    this.wake = () => {};
    this.abort = null;
    this.isChanged = false; // by `restart`
    document.addEventListener("visibilitychange", () => {
      if (document.hidden) this.abort?.abort();
      else this.wake();
    });
  }

  /** Connect anew, since the key has changed. */
  restart() {
    this.isChanged = true;
    this.abort?.abort();
    this.wake();
  }

  async run() {
    for (let tries = 0; ; ) {
      this.isChanged = false;
      if (document.hidden) {
        this.stands("paused");
        await this.pause();
        continue;
      }
      const why = await this.connection(() => (tries = 0));
      if (document.hidden || this.isChanged) continue;
      if (why === "key") {
        this.stands("key", Boolean(key.get()));
        await this.pause();
      } else {
        const waitMs = Math.min(LONGEST_WAIT_MS, 500 * 2 ** tries++);
        this.stands(why, Math.round(waitMs / 1000));
        await this.pause(waitMs);
      }
    }
  }

  /** Wait for `wake`, or so long. */
  pause(ms) {
    return new Promise((resolve) => {
      const timer = ms === undefined ? 0 : setTimeout(resolve, ms);
      this.wake = () => (clearTimeout(timer), resolve());
    });
  }

  /** Read the feed until it ends, and return why. */
  async connection(begun) {
    const abort = (this.abort = new AbortController());
    let silence = setTimeout(() => abort.abort(), SILENCE_MS);
    this.stands("connecting");
    try {
      const response = await fetch("page/feed", {
        headers: authorization(), signal: abort.signal, cache: "no-store",
      });
      if (response.status === 401) return "key";
      if (response.status === 503) return "loading";
      if (response.status === 429) return "full";
      if (!response.ok) return "lost";
      for await (const event of events(response)) {
        clearTimeout(silence);
        silence = setTimeout(() => abort.abort(), SILENCE_MS);
        begun();
        this.stands("live");
        this.told(JSON.parse(event));
      }
      return "lost";
    } catch (error) {
      // A key that cannot be written into a header is a wrong one.
      return error instanceof TypeError && /header|ByteString|ISO-8859-1/i.test(error.message) ? "key" : "lost";
    } finally {
      clearTimeout(silence);
      abort.abort();
    }
  }
}
