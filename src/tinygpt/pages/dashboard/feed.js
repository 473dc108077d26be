// What is new of the runs, as the server tells it; after every break from where it broke off.

import { ApiError, eventData, request } from "../shared/net.js";

const SILENCE = 25_000; // ms: the server says something every ten seconds
const FIRST_WAIT = 500;
const LONGEST_WAIT = 15_000;

/**
 * ``cursor()`` says what the page has, ``onEvent`` is given every event, one after the other, and
 * ``onState("live" | "waiting" | "refused")`` what becomes of the connection. An event
 * that could not be taken in for want of an answer is a connection that was lost: it comes again.
 */
export class Feed {
  constructor({ cursor, onEvent, onState }) {
    Object.assign(this, { cursor, onEvent, onState });
    this.wait = FIRST_WAIT;
    document.addEventListener("visibilitychange", () => this.#wake());
    window.addEventListener("online", () => this.restart());
    window.addEventListener("pageshow", (event) => event.persisted && this.restart());
  }

  /** Begin, or begin again at once from what the page has now. */
  restart() {
    this.wait = FIRST_WAIT;
    this.#connect();
  }

  async #connect() {
    clearTimeout(this.timer);
    this.controller?.abort();
    const own = (this.controller = new AbortController());
    try {
      await this.#listen(own.signal);
    } catch (error) {
      if (own.signal.aborted && this.controller !== own) return; // another has begun
      if (error.status === 401) {
        this.onState("refused");
        return;
      }
      if (!own.signal.aborted && !(error instanceof ApiError)) reportError(error); // our mistake
    }
    if (this.controller === own) this.#later();
  }

  #later() {
    const wait = this.wait * (0.8 + 0.4 * Math.random()); // not all pages at once
    this.onState("waiting");
    this.timer = setTimeout(() => this.#connect(), wait);
    this.wait = Math.min(this.wait * 2, LONGEST_WAIT);
  }

  async #listen(signal) {
    const cursor = this.cursor();
    const headers = cursor ? { "Last-Event-ID": cursor } : {};
    this.#heard();
    const response = await request("dashboard/events", { headers, signal });
    this.onState("live");
    const heard = () => {
      this.#heard();
      this.wait = FIRST_WAIT;
    };
    for await (const data of eventData(response, signal, heard)) {
      if (!signal.aborted) await this.onEvent(JSON.parse(data));
    }
  }

  /** A connection that says nothing for long is dead, whatever the browser believes. */
  #heard() {
    this.last = Date.now();
    clearTimeout(this.silence);
    const own = this.controller;
    this.silence = setTimeout(() => this.controller === own && own.abort(), SILENCE);
  }

  /** After sleep timers have stood still: what is silent by the clock is taken up at once. */
  #wake() {
    if (document.visibilityState === "visible" && Date.now() - this.last > SILENCE / 2) this.restart();
  }
}
