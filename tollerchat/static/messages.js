/** How messages look and where they stand: elements of the log, each with its message as `node.message`. */

const GROUP_MS = 5 * 60_000; // consecutive messages of one user this close together share one name

const clock = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit" });
const calendar = new Intl.DateTimeFormat(undefined, { weekday: "long", day: "numeric", month: "long", year: "numeric" });

export function make(tag, className = "", text = "") {
  const node = document.createElement(tag);
  node.className = className;
  node.textContent = text;
  return node;
}

export function messageNode(message) {
  const node = make("article", "message");
  node.message = message;
  node.classList.toggle("own", message.own);
  const avatar = make("span", "avatar", String(message.user_id).slice(-3)); // room for three digits
  avatar.setAttribute("aria-hidden", "true");
  avatar.dataset.tone = message.user_id % 6;
  const content = make("div", "content", message.content);
  content.dir = "auto";
  const meta = make("span", "meta");
  meta.append(make("time"), make("span", "delivery"));
  const bubble = make("div", "bubble");
  bubble.append(content, meta);
  node.append(make("p", "day"), avatar, make("p", "sender", message.own ? "You" : `User ${message.user_id}`), bubble, make("p", "failure"));
  if (message.own) setDelivery(node, "sent");
  stamp(node, message);
  return node;
}

export function stamp(node, { message_id, created_at }) {
  Object.assign(node.message, { message_id, created_at: new Date(created_at) });
  if (message_id) node.dataset.messageId = message_id;
  const time = node.querySelector("time");
  time.dateTime = node.message.created_at.toISOString();
  time.textContent = clock.format(node.message.created_at);
}

export function setDelivery(node, state, reason = "") {
  node.dataset.delivery = state;
  const label = { sending: "Sending", sent: "Sent", failed: "Not sent" }[state];
  node.querySelector(".delivery").replaceChildren(make("span", "sr", label));
  const failure = node.querySelector(".failure");
  failure.textContent = reason;
  if (state !== "failed") return;
  const retry = make("button", "retry", "Retry");
  retry.type = "button";
  failure.append(" ", retry);
}

/** A notice stands behind the message it is about; a button is passed by nothing. */
const idOf = ({ message, dataset }) => (message ? message.message_id ?? Infinity : Number(dataset.after ?? 0));

/** Messages stand in the order of their ids; what has none yet stands last. */
export function place(node) {
  const log = document.getElementById("log");
  const id = idOf(node);
  const next = node.nextElementSibling;
  let before = log.lastElementChild;
  while (before && (before === node || idOf(before) > id)) before = before.previousElementSibling;
  // Moving a node that already stands right would lose the focus of its button.
  if (!node.isConnected || node.previousElementSibling !== before) {
    if (before) before.after(node);
    else log.prepend(node);
  }
  for (const changed of new Set([node, node.nextElementSibling, next])) if (changed) decorate(changed);
}

/** Day and sender are shown where they differ from the message before. */
function decorate(node) {
  if (!node.message) return;
  const { created_at, user_id } = node.message;
  const previous = node.previousElementSibling?.message;
  const day = calendar.format(created_at);
  const newDay = !previous || calendar.format(previous.created_at) !== day;
  node.querySelector(".day").textContent = newDay ? day : "";
  node.classList.toggle("grouped", !newDay && previous.user_id === user_id && created_at - previous.created_at < GROUP_MS);
}
