/**
 * Browser client of one tollerchat channel. No dependencies; import it as an ES module:
 *
 *     import { TollerChat } from "./tollerchat.js";
 *     const chat = new TollerChat({ channelId: 1, token });
 *     chat.addEventListener("message", ({ detail }) => show(detail));
 *     chat.addEventListener("ack", ({ detail }) => markSent(detail.nonce, detail.message_id));
 *     chat.connect();
 *     const nonce = chat.send("Hello");
 *
 * Every message of the channel is reported exactly once: as `message`, or, where this client sent it, as
 * `ack`. They come in the order of their ids, but for what a reconnect has left open: acks of messages that were sent
 * again, and messages of the same user with the same text. So order what you show by `message_id`.
 *
 * Events (`event.detail`):
 *   state    {state, code, retryAt}  see State; retryAt (ms, as Date.now) while a new attempt is waited for
 *   ready    {user_id, last_message_id, gap, after}  history is complete; with gap, messages following id
 *            `after` were too many to be sent again
 *   reset    the newest messages were deleted, or all, and ids may start again: forget all; the last ones come again
 *   message  {message_id, user_id, channel_id, content, created_at, own}  own: same user, maybe another device
 *   ack      {nonce, content, message_id, created_at}  the message is stored
 *   failed   {nonce, content, code, message, mayBeStored}  the message was refused and will not be sent again by
 *            itself; where the connection ended for good instead, and its answer was lost, it may be stored
 *   typing   {user_id}
 *   error    {code, message}  an error that belongs to no message
 *
 * @typedef {"connecting"|"online"|"reconnecting"|"offline"|"signed-out"} State
 *   "signed-out" is for good: `code` is 4401 where a new token will do, see setToken(); 4403 without access, 4404
 *   without such a channel, or that of a frame the server could not take (docs/protocol.md, "Close codes").
 */

const MAX_FRAME_BYTES = 8192;

const PROTOCOL = "tollerchat.v1";
const MAX_IN_FLIGHT = 8; // a long outbox must not look like a flood after a reconnect
const SILENCE_MS = 15_000; // waiting for the server this long without a single frame: the link is dead
const IDLE_MS = 60_000; // without a single frame; then the server is asked for one
const STABLE_MS = 10_000; // a connection this old resets the reconnect delay
const MAX_DELAY_MS = 30_000;
const TYPING_MS = 1_000;

const TOKEN_EXPIRED = 4401;
const FINAL_CODES = new Set([1002, 1007, 1008, 1009, TOKEN_EXPIRED, 4403, 4404]);
/** What an upgrade refused over HTTP means, in terms of close codes. Anything else is worth another try. */
const REFUSALS = { unauthorized: TOKEN_EXPIRED, forbidden: 4403, not_found: 4404, bad_request: 4404 };
const RETRY_ERRORS = new Set(["unavailable", "rate_limited"]);

/** Full jitter: after an outage, thousands of clients must not come back in step. */
const jitter = (attempt) => Math.random() * Math.min(MAX_DELAY_MS, 1_000 * 2 ** attempt);

/** Random name of a message. crypto.randomUUID does not exist on plain http beyond localhost. */
const newNonce = () => Array.from(crypto.getRandomValues(new Uint8Array(16)), (b) => b.toString(16).padStart(2, "0")).join("");

// A lone surrogate has no UTF-8 form and would make the whole frame invalid.
const wellFormed = (text) => text.replace(/\p{Surrogate}/gu, "\ufffd");
const messageFrame = (content, nonce) => JSON.stringify({ type: "message", content, nonce });

/** How many bytes `content` is over what one frame can carry; 0 or less: it fits. */
export function excessBytes(content, maxFrameBytes = MAX_FRAME_BYTES) {
  return new TextEncoder().encode(messageFrame(wellFormed(content), "0".repeat(32))).length - maxFrameBytes;
}

/** The user id a JWT claims, or null. Unverified: good for display until the server says `ready`. */
export function userIdOf(token) {
  try {
    const claims = JSON.parse(atob(token.split(".")[1].replaceAll("-", "+").replaceAll("_", "/")));
    return Number(claims.user_id ?? claims.sub) || null;
  } catch {
    return null;
  }
}

export class TollerChat extends EventTarget {
  #base;
  #maxFrameBytes;
  #token;
  #dialledWith = null; // the token that the connection was opened with
  #socket = null;
  #started = false;
  #cursor = null; // last id received from the channel; null before the first connection got anything
  #anchor = null; // when the message of that id was created: ids may start again meanwhile
  #resumedFrom = null;
  #pending = new Map(); // nonce -> {content, inFlight, mayBeStored, answerLost}, in the order of sending
  #held = new Map(); // id -> own message that may be one of #pending whose ack was lost
  #reconnects = 0;
  #refusals = 0; // consecutive "try again later" answers to messages
  #lastTyping = -Infinity;
  #timers = {};

  /**
   * @param {object} options
   * @param {number} options.channelId positive integer
   * @param {string} options.token JWT
   * @param {string|URL} [options.base] where the server is mounted; default: the directory of the page
   * @param {number} [options.maxFrameBytes] where the server has another MAX_FRAME_SIZE than 8192
   */
  constructor({ channelId, token, base, maxFrameBytes = MAX_FRAME_BYTES }) {
    super();
    if (!Number.isSafeInteger(channelId) || channelId < 1) throw new TypeError("channelId must be a positive integer");
    this.channelId = channelId;
    this.state = /** @type {State} */ ("connecting");
    this.#base = base ? new URL(`${base}`.replace(/\/*$/, "/"), document.baseURI) : document.baseURI;
    this.#maxFrameBytes = maxFrameBytes;
    this.#useToken(token);
  }

  /** Connect, and stay connected until close() or a close code that is final. */
  connect() {
    if (this.#started) return;
    this.#started = true;
    addEventListener("online", this.#online);
    addEventListener("offline", this.#offline);
    this.#setState("connecting");
    this.#dial();
  }

  /** Disconnect for good. Messages without an ack stay known and are sent again by the next connect(). */
  close() {
    this.#started = false;
    removeEventListener("online", this.#online);
    removeEventListener("offline", this.#offline);
    this.#drop();
    this.state = "offline"; // no event: the caller knows
  }

  /** Replace the token by another one of the same user: extends the running session, or ends being signed out. */
  setToken(token) {
    this.#useToken(token);
    if (this.state === "signed-out") this.connect();
    else if (this.state === "online") this.#extend();
  }

  /**
   * Queue a message; it is sent now or as soon as there is a connection, and again until it is answered.
   * @param {string} content
   * @param {string} [nonce] only to send a message again (one that failed, or from before a page reload)
   * @returns {string} the nonce that `ack` or `failed` will carry
   * @throws {RangeError} content does not fit one frame
   */
  send(content, nonce) {
    const again = nonce !== undefined; // then it may be in the log already
    nonce ??= newNonce();
    const excess = excessBytes(content, this.#maxFrameBytes);
    if (excess > 0) throw new RangeError(`content is ${excess} bytes too long`);
    this.#pending.set(nonce, { content: wellFormed(content), inFlight: false, mayBeStored: again, answerLost: again });
    this.#flush();
    return nonce;
  }

  /** Tell the others that this user is typing; call it on every key, it is passed on once a second. */
  typing() {
    const now = performance.now();
    if (this.state !== "online" || now - this.#lastTyping < TYPING_MS) return;
    this.#lastTyping = now;
    this.#socket.send('{"type":"typing"}');
  }

  /** A page of older messages, oldest first, or the newest one: {messages, has_more}. */
  async history({ before, limit = 50 } = {}) {
    const response = await this.#get({ before, limit });
    if (!response.ok) throw new Error(`history: ${response.status}`);
    const page = await response.json();
    for (const message of page.messages) message.own = message.user_id === this.userId;
    return page;
  }

  #useToken(token) {
    if (typeof token !== "string" || !/^[\w.-]+$/.test(token)) throw new TypeError("token is not a JWT");
    const userId = userIdOf(token);
    if (userId && this.userId && userId !== this.userId) throw new TypeError("token is of another user");
    this.#token = token;
    this.userId = userId ?? this.userId ?? null;
  }

  #extend() {
    this.#socket.send(JSON.stringify({ type: "auth", token: this.#token }));
  }

  #get(query, signal) {
    const given = Object.entries(query).filter(([, value]) => value !== undefined);
    const url = new URL(`channels/${this.channelId}/messages?${new URLSearchParams(given)}`, this.#base);
    return fetch(url, { headers: { Authorization: `Bearer ${this.#token}` }, signal });
  }

  #emit(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }

  #setState(state, { code = null, retryAt = null } = {}) {
    this.state = state;
    this.#emit("state", { state, code, retryAt });
  }

  #timer(name, action, ms) {
    clearTimeout(this.#timers[name]);
    this.#timers[name] = action && setTimeout(action, ms);
  }

  #dial() {
    if (!this.#started) return; // closed by a listener
    this.#drop();
    const url = new URL(`ws/channel/${this.channelId}`, this.#base);
    url.protocol = url.protocol.replace("http", "ws");
    this.#resumedFrom = this.#cursor;
    this.#dialledWith = this.#token;
    if (this.#cursor !== null) url.searchParams.set("after", this.#cursor - (this.#anchor ? 1 : 0));
    // In a subprotocol the token stays out of URLs, and so out of logs.
    const socket = new WebSocket(url, [PROTOCOL, `bearer.${this.#token}`]);
    let opened = false;
    socket.onopen = () => (opened = true);
    // A socket that was given up may still report: only the current one counts.
    socket.onmessage = ({ data }) => socket === this.#socket && this.#receive(JSON.parse(data));
    socket.onclose = ({ code }) => socket === this.#socket && this.#closed(code, opened);
    this.#socket = socket;
    this.#watch();
  }

  /** Give the socket up now; a close handshake over a dead link would take minutes. */
  #drop() {
    const socket = this.#socket;
    this.#socket = null;
    for (const name of Object.keys(this.#timers)) this.#timer(name, null);
    for (const entry of this.#pending.values()) {
      entry.inFlight = false;
      entry.answerLost = entry.mayBeStored;
    }
    socket?.close();
  }

  /** Silence is the only sign of a dead link. A browser cannot ping, so it asks with what the server does not know. */
  #watch(due = this.state !== "online" || [...this.#pending.values()].some((entry) => entry.inFlight)) {
    const act = due ? () => this.#closed(1006, true) : () => this.#ask();
    this.#timer("watch", this.#socket && act, due ? SILENCE_MS : IDLE_MS);
  }

  #ask() {
    this.#socket.send('{"type":"ping"}'); // answered with the error unknown_type
    this.#watch(true);
  }

  async #closed(code, opened) {
    this.#drop();
    if (!FINAL_CODES.has(code) && !opened) {
      code = (await this.#whyRefused()) ?? code;
      if (this.#socket || !this.#started) return; // dialled or closed meanwhile
    }
    // The end of a token may cross with the next one on its way.
    const isOutdated = code === TOKEN_EXPIRED && this.#token !== this.#dialledWith;
    if (FINAL_CODES.has(code) && !isOutdated) this.#stop(code);
    else this.#reconnect(navigator.onLine ? jitter(this.#reconnects++) : MAX_DELAY_MS);
  }

  /** Browsers hide the status of a refused upgrade; the HTTP route has the same rules and tells. */
  async #whyRefused() {
    const abort = new AbortController();
    const timer = setTimeout(() => abort.abort(), SILENCE_MS);
    try {
      const response = await this.#get({ limit: 1 }, abort.signal);
      return response.ok ? null : REFUSALS[(await response.json()).error.code];
    } catch {
      return null; // unreachable, or not our server's answer, or none
    } finally {
      clearTimeout(timer);
    }
  }

  #reconnect(delay) {
    this.#timer("reconnect", () => this.#redial(), delay);
    this.#setState(navigator.onLine ? "reconnecting" : "offline", { retryAt: Date.now() + delay });
  }

  #redial() {
    if (!this.#started) return;
    this.#setState(navigator.onLine ? "reconnecting" : "offline");
    this.#dial();
  }

  #online = () => {
    if (this.state !== "online") this.#redial();
  };

  #offline = () => {
    this.#drop();
    this.#reconnect(MAX_DELAY_MS); // still tried now and then: a browser can be wrong (localhost, VPN)
  };

  #stop(code) {
    this.close();
    this.#setState("signed-out", { code });
    if (code === TOKEN_EXPIRED) return; // the outbox waits for the new token
    for (const nonce of [...this.#pending.keys()]) this.#fail(nonce, String(code), "the connection ended for good");
  }

  #receive(frame) {
    switch (frame.type) {
      case "message":
        this.#message(frame);
        break;
      case "ack":
        this.#ack(frame);
        break;
      case "error":
        this.#error(frame);
        break;
      case "ready":
        this.#ready(frame);
        break;
      case "typing":
        if (frame.user_id !== this.userId) this.#emit("typing", { user_id: frame.user_id });
    }
    this.#watch();
  }

  #message(frame) {
    const id = frame.message_id;
    if (id === this.#cursor && this.#anchor && frame.created_at !== this.#anchor) return this.#startOver();
    if (this.#cursor !== null && id <= this.#cursor) return;
    this.#advance(id, frame.created_at);
    frame.own = frame.user_id === this.userId;
    // Perhaps a message whose ack was lost, coming back as history. Its nonce, sent again, will tell.
    if (frame.own && this.#awaits(frame.content)) this.#held.set(id, frame);
    else this.#emit("message", frame);
  }

  #advance(id, createdAt = null) {
    if (this.#cursor !== null && id <= this.#cursor) return;
    this.#cursor = id;
    this.#anchor = createdAt;
  }

  /** What was known may be of ids that are given again. */
  #startOver() {
    this.#cursor = this.#anchor = null;
    this.#held.clear();
    this.#emit("reset");
    this.#redial();
  }

  #awaits(content) {
    return [...this.#pending.values()].some((entry) => entry.answerLost && entry.content === content);
  }

  #ready({ user_id, last_message_id, gap }) {
    this.userId = user_id;
    if (last_message_id < this.#cursor) return this.#startOver();
    this.#advance(last_message_id);
    this.#timer("stable", () => (this.#reconnects = 0), STABLE_MS);
    this.#setState("online");
    if (this.state !== "online") return; // closed by a listener
    if (this.#token !== this.#dialledWith) this.#extend();
    this.#emit("ready", { user_id, last_message_id, gap, after: this.#resumedFrom });
    this.#flush();
  }

  #ack({ nonce, message_id, created_at }) {
    this.#advance(message_id, created_at); // all that is before it was sent before it
    const entry = this.#pending.get(nonce);
    if (!entry) return; // answered before
    this.#refusals = 0;
    this.#held.delete(message_id);
    this.#settle(nonce, "ack", { nonce, content: entry.content, message_id, created_at });
  }

  #error({ code, message, nonce }) {
    const entry = this.#pending.get(nonce);
    if (!entry) return nonce || code === "unknown_type" ? undefined : this.#emit("error", { code, message });
    if (!RETRY_ERRORS.has(code)) {
      entry.mayBeStored = false;
      return this.#fail(nonce, code, message);
    }
    entry.inFlight = false;
    // Until then nothing else is sent either, which keeps the order of messages.
    this.#timer("retry", () => this.#flush(true), 500 + jitter(Math.min(this.#refusals++, 5)));
  }

  #fail(nonce, code, message) {
    const { content, mayBeStored } = this.#pending.get(nonce);
    this.#settle(nonce, "failed", { nonce, content, code, message, mayBeStored });
  }

  #settle(nonce, type, detail) {
    this.#pending.delete(nonce);
    this.#emit(type, detail);
    for (const [id, frame] of this.#held) {
      if (this.#awaits(frame.content)) continue;
      this.#held.delete(id);
      this.#emit("message", frame);
    }
    this.#flush();
  }

  #flush(retrying = false) {
    if (retrying) this.#timer("retry", null);
    if (this.state !== "online" || this.#timers.retry) return;
    let room = MAX_IN_FLIGHT;
    for (const [nonce, entry] of this.#pending) {
      if (room-- === 0) break;
      if (entry.inFlight) continue;
      entry.inFlight = entry.mayBeStored = true;
      this.#socket.send(messageFrame(entry.content, nonce));
    }
    this.#watch();
  }
}
