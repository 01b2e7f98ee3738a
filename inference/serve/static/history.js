// What this browser remembers: settings, and the words of sessions that are over.

const SETTINGS = "moss-settings", PAST = "moss-sessions";
const MOST = 20;       // sessions
const PICTURES = 30;   // of a session

export const DEFAULTS = {
  prompt: "", instructions: "", interval: 1, side: 560, key: "",
  temperature: "", silence_bias: "", max_output_tokens: "",
};

function read(name, without) {
  try {
    return JSON.parse(localStorage.getItem(name)) ?? without;
  } catch {
    return without;   // no storage, or not ours
  }
}

/** Settings as they were last; the key of the address (#key=KEY) goes first, and is not kept. */
export function settings() {
  const given = new URLSearchParams(location.hash.slice(1)).get("key");
  return { ...DEFAULTS, ...read(SETTINGS, {}), ...(given ? { key: given } : {}) };
}

export function keepSettings({ key, ...rest }) {
  try {
    localStorage.setItem(SETTINGS, JSON.stringify(rest));
  } catch { /* a private window: they last as long as the page */ }
}

/** Sessions that are over, the newest first: {id, name, began, lines}. */
export function past() { return read(PAST, []); }

function keep(sessions) {
  for (let count = Math.min(sessions.length, MOST); count >= 0; count--) {
    try {
      localStorage.setItem(PAST, JSON.stringify(sessions.slice(0, count)));
      return;
    } catch { /* no space: the oldest goes */ }
  }
}

export function record(session) {
  const from = session.lines.length - PICTURES;
  const lines = session.lines.map((line, at) => at >= from ? line : { ...line, picture: null });
  return { id: session.id ?? String(+session.began), name: session.name, began: session.began, lines };
}

export function remember(session) {
  if (!session.lines.length) return;
  const own = record(session);
  keep([own, ...past().filter((other) => other.id !== own.id)]);
}

export function forget(id) { keep(past().filter((other) => other.id !== id)); }
