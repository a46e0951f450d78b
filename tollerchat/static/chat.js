/** The web chat: shows what TollerChat reports and nothing else. All text goes in as text, never as HTML. */

import { make, messageNode, place, setDelivery, stamp } from "./messages.js";
import { TollerChat, excessBytes, userIdOf } from "./tollerchat.js";

const $ = (id) => document.getElementById(id);
const log = $("log");
const composer = $("composer");

const TYPING_SHOWN_MS = 3_000;

const STATES = { connecting: "Connecting…", online: "Online", reconnecting: "Reconnecting", offline: "Offline", "signed-out": "Signed out" };
const SIGNED_OUT = {
  1008: "The server closed the connection because of too many requests.",
  1009: "The server closed the connection: a message was too large.",
  4401: "Your token is not valid or has expired. Enter a new one to go on.",
  4403: "You do not have access to this channel.",
  4404: "This channel does not exist.",
};

let chat = null;

// --- The session: which channel, and who. Per tab, so two tabs can be two users.

function takeSessionFromLink() {
  const link = new URLSearchParams(location.hash.slice(1));
  if (!link.has("token")) return;
  sessionStorage.setItem("tollerchat.channel", link.get("channel") ?? "1");
  sessionStorage.setItem("tollerchat.token", link.get("token"));
  // Out of the address bar, the history and screenshots.
  history.replaceState(null, "", location.pathname + location.search);
}

function start() {
  const token = sessionStorage.getItem("tollerchat.token");
  const channelId = Number(sessionStorage.getItem("tollerchat.channel"));
  if (!token) return askForToken();
  try {
    chat = new TollerChat({ channelId, token });
  } catch {
    return askForToken("This link is incomplete: its channel or token is not valid.");
  }
  $("title").textContent = document.title = `Channel ${channelId}`;
  for (const [type, handle] of Object.entries(handlers)) chat.addEventListener(type, ({ detail }) => handle(detail));
  showUser();
  for (const { nonce, content, failure } of savedOutbox()) {
    if (failure) showFailed(nonce, waitingNode(nonce, content), failure); // it is not sent again by itself
    else sendAs(content, nonce);
  }
  chat.connect();
  composer.focus();
}

function showUser() {
  $("whoami").textContent = chat.userId ? `You are User ${chat.userId}` : "";
}

function askForToken(reason = "") {
  $("join-reason").textContent = reason;
  $("join-cancel").hidden = !chat; // behind it is nothing to go back to
  if ($("join").open) return; // somebody may be writing in it
  $("join-channel").value = sessionStorage.getItem("tollerchat.channel") ?? "1";
  $("join-token").value = $("join-error").textContent = "";
  $("join").showModal();
  $("join-token").focus();
}

$("join").addEventListener("close", () => {
  if (chat) composer.focus();
  else if (!$("join").open) askForToken(); // Escape, with nothing behind to go back to
});
$("join-cancel").addEventListener("click", () => $("join").close());
$("switch").addEventListener("click", () => askForToken());
addEventListener("hashchange", () => location.reload()); // another link opened in this tab

$("join-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const channel = $("join-channel").value;
  const token = $("join-token").value.replace(/\s/g, ""); // terminals wrap lines
  const userId = userIdOf(token);
  if (!userId) {
    $("join-error").textContent = "This is not a token: it should be three parts joined by dots, without spaces.";
    return $("join-token").focus();
  }
  const same = chat && chat.channelId === Number(channel) && chat.userId === userId;
  sessionStorage.setItem("tollerchat.channel", channel);
  sessionStorage.setItem("tollerchat.token", token);
  if (chat && !same) return location.reload();
  $("join").close();
  if (same) chat.setToken(token);
  else start();
});

// --- The outbox outlives a reload: a message is either stored, or still here.

const outbox = new Map(); // nonce -> the element of a message that is being sent, or failed
const outboxKey = () => `tollerchat.outbox.${chat.channelId}.${chat.userId}`;

function savedOutbox() {
  return JSON.parse(sessionStorage.getItem(outboxKey()) ?? "[]");
}

function saveOutbox() {
  const waiting = [...outbox].map(([nonce, node]) => ({ nonce, content: node.message.content, failure: node.failure }));
  try {
    sessionStorage.setItem(outboxKey(), JSON.stringify(waiting));
  } catch {
    // Full: these will not outlive a reload.
  }
}

function waitingNode(nonce, content) {
  if (!outbox.has(nonce)) outbox.set(nonce, messageNode({ content, user_id: chat.userId, created_at: new Date(), own: true }));
  return outbox.get(nonce);
}

function showFailed(nonce, node, failure) {
  node.failure = failure;
  setDelivery(node, "failed", failure);
  saveOutbox();
  place(node);
}

/** Returns whether it is on its way: not without a token that does. */
function sendAs(content, nonce) {
  if (chat.state === "signed-out") {
    askForToken($("join-reason").textContent);
    return false;
  }
  const node = waitingNode(chat.send(content, nonce), content);
  node.failure = undefined;
  setDelivery(node, "sending");
  saveOutbox();
  place(node);
  $("empty").hidden = true;
  toBottom();
  return true;
}

// --- Messages.

log.addEventListener("click", ({ target }) => {
  if (!target.matches(".retry")) return;
  const node = target.closest(".message");
  for (const [nonce, waiting] of outbox) if (waiting === node) sendAs(node.message.content, nonce);
  composer.focus();
});

// --- Older messages.

let earliest = Infinity;
const shown = (id) => log.querySelector(`[data-message-id="${id}"]`);
const announceSoon = () => setTimeout(() => log.setAttribute("aria-live", "polite"), 500);

let asked = false;
async function offerEarlier() {
  asked = true;
  const before = earliest;
  const { messages } = await chat.history({ before, limit: 1 }).catch(() => ({ messages: [null] })); // perhaps
  if (messages.length && asked && before === earliest) log.prepend(earlier);
}

const earlier = make("button", "quiet earlier", "Earlier messages");
earlier.type = "button";
earlier.addEventListener("click", async () => {
  earlier.disabled = true;
  try {
    const { messages, has_more } = await chat.history({ before: earliest });
    const bubble = log.querySelector(".bubble"); // not its message: the day above it may go
    const top = bubble.getBoundingClientRect().top;
    log.setAttribute("aria-live", "off"); // old messages are not news
    for (const message of messages) if (!shown(message.message_id)) place(messageNode(message));
    earliest = messages[0]?.message_id ?? earliest;
    if (!has_more) earlier.remove();
    log.scrollTop += bubble.getBoundingClientRect().top - top;
    announceSoon();
    log.focus();
    earlier.textContent = "Earlier messages";
  } catch {
    earlier.textContent = "Could not be loaded. Try again";
  }
  earlier.disabled = false;
});

// --- Scrolling: follow the newest message, unless the reader has scrolled up.

let following = true;
let unseen = 0;

function toBottom() {
  following = true;
  follow();
}

function follow() {
  // Once per picture, however many messages came; layout is too slow to be asked for each.
  requestAnimationFrame(() => following && (log.scrollTop = log.scrollHeight));
}

function countUnseen(change) {
  unseen = change && unseen + change;
  $("newer").hidden = !unseen;
  $("newer").textContent = unseen === 1 ? "1 new message" : `${unseen} new messages`;
  document.title = (unseen ? `(${unseen}) ` : "") + $("title").textContent;
}

function seenIfVisible() {
  if (following && !document.hidden && unseen) countUnseen(0);
}

let lastTop = 0;
log.addEventListener("scroll", () => {
  // Only the reader moves up. A message that came between scrolling and this event must not look like that.
  if (log.scrollTop < lastTop || !following) following = log.scrollHeight - log.scrollTop - log.clientHeight < 48;
  lastTop = log.scrollTop;
  seenIfVisible();
}, { passive: true });
document.addEventListener("visibilitychange", seenIfVisible);
new ResizeObserver(() => following && follow()).observe(log); // the on-screen keyboard, a growing composer
$("newer").addEventListener("click", () => {
  toBottom();
  countUnseen(0);
  composer.focus();
});

// --- Who is typing.

const typists = new Map(); // user_id -> timer

function setTyping(userId, typing) {
  clearTimeout(typists.get(userId));
  if (typing) typists.set(userId, setTimeout(setTyping, TYPING_SHOWN_MS, userId, false));
  else typists.delete(userId);
  const names = [...typists.keys()].map((id) => `User ${id}`);
  $("typing").textContent =
    names.length === 0 ? "" : names.length > 3 ? "Several people are typing" : `${names.join(", ")} ${names.length === 1 ? "is" : "are"} typing`;
}

// --- What the client reports.

let countdown;

function showCountdown(retryAt) {
  clearTimeout(countdown);
  const seconds = Math.ceil((retryAt - Date.now()) / 1000);
  $("countdown").textContent = seconds > 0 ? `in ${seconds} s` : "";
  if (seconds > 0) countdown = setTimeout(showCountdown, 500, retryAt);
}

const handlers = {
  state({ state, code, retryAt }) {
    if ($("status").dataset.state !== state) $("status").textContent = STATES[state];
    $("status").dataset.state = state;
    showCountdown(retryAt ?? 0);
    if (state !== "online") for (const id of [...typists.keys()]) setTyping(id, false);
    if (state === "signed-out") askForToken(SIGNED_OUT[code]);
  },

  ready({ gap, after }) {
    showUser();
    if (gap) {
      const lost = make("p", "notice", "Some messages from while you were away are not shown. Reload to see the newest.");
      lost.dataset.after = after;
      place(lost);
    }
    if (!asked && earliest < Infinity) offerEarlier();
    $("empty").hidden = log.querySelector(".message") !== null;
    announceSoon();
  },

  reset() {
    earliest = Infinity;
    asked = false;
    earlier.remove();
    log.setAttribute("aria-live", "off"); // what comes again is not news
    countUnseen(0);
    for (const node of log.querySelectorAll(".message[data-message-id], .notice")) node.remove();
  },

  message(message) {
    earliest = Math.min(earliest, message.message_id);
    place(messageNode(message));
    $("empty").hidden = true;
    setTyping(message.user_id, false);
    if (following) follow();
    // Not news: what one wrote oneself elsewhere, and the history that comes before going live.
    if (!message.own && log.getAttribute("aria-live") === "polite" && (!following || document.hidden)) countUnseen(+1);
  },

  ack({ nonce, message_id, created_at }) {
    const node = outbox.get(nonce);
    outbox.delete(nonce);
    saveOutbox();
    if (shown(message_id)) return node.remove(); // failed here, yet stored
    stamp(node, { message_id, created_at });
    setDelivery(node, "sent");
    place(node);
  },

  failed({ nonce, code, message, mayBeStored }) {
    const outcome = mayBeStored ? "Perhaps not sent" : "Not sent";
    showFailed(nonce, outbox.get(nonce), `${outcome}: ${message || code}.`);
    follow();
  },

  typing({ user_id }) {
    setTyping(user_id, true);
  },

  error({ code, message }) {
    $("hint").textContent = `The server says: ${message || code}`;
  },
};

// --- The composer.

function measure() {
  const excess = excessBytes(composer.value);
  $("hint").textContent = excess > 0 ? `Too long by ${excess} bytes. Shorten it, or send it in parts.` : "";
  $("send").disabled = excess > 0 || !composer.value.trim() || !chat;
  composer.style.height = "auto";
  composer.style.height = `${composer.scrollHeight}px`;
}

composer.addEventListener("input", () => {
  measure();
  if (composer.value.trim()) chat?.typing();
});

composer.addEventListener("keydown", (event) => {
  // While an input method composes (Japanese, Chinese), Enter picks a word.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("write").requestSubmit();
});

$("write").addEventListener("submit", (event) => {
  event.preventDefault();
  measure();
  if (!$("send").disabled && sendAs(composer.value)) {
    composer.value = "";
    measure();
  }
  composer.focus();
});

takeSessionFromLink();
start();
