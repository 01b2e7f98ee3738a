// The page: which sessions there are, which one is shown, and what of it.

import { forget, keepSettings, past, record, remember, settings } from "./history.js";
import { LINES, Session } from "./session.js";
import { Live, Recording } from "./sources.js";

const $ = (id) => document.getElementById(id);
const sessions = [];   // that are going on or were, since the page was opened; the newest first
let shown = null;      // one of them, or one of the past
let using = settings();

function clock(seconds) {
  const whole = Math.floor(seconds + 1e-6);
  return String(Math.floor(whole / 60)).padStart(2, "0") + ":" + String(whole % 60).padStart(2, "0");
}

function made(name, properties, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
}

// ---- sessions

async function begin(open) {
  let source;
  try {
    source = await open();
    await source.started;
  } catch (error) {
    if (source) source.stop();
    $("status").textContent = `cannot be opened: ${error.message}`;
    return;
  }
  const session = new Session(source, using, changed);
  sessions.unshift(session);
  show(session);
}

function changed(session, what) {
  if (what === "state") {
    if (!session.live) remember(session);
    list();
  }
  if (session !== shown) return;
  if (what === "state") state();
  else if (what === "line") addLine(session.lines[session.lines.length - 1]);
  else if (what === "text") $("said").lastSpeech.textContent = session.speech.text;
  else if (what === "frame") seen();
}

function show(session) {
  shown = session;
  $("stage").replaceChildren(...(session && session.source ? [session.source.video] : []));
  if (session && session.live) session.source.video.play().catch(() => {});   // moving it pauses it
  $("said").replaceChildren();
  $("said").lastSpeech = null;
  for (const line of session ? session.lines : []) addLine(line);
  list();
  state();
  seen();
}

function everything() {
  const own = new Set(sessions.map((session) => session.id));
  return [...sessions, ...past().filter((one) => !own.has(one.id))];
}

function list() {
  const items = everything().map((session, number) => {
    const when = new Date(session.began).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
    const words = `${session.name} ${when}` + (session.live ? `, ${session.state}` : "");
    const button = made("button", { textContent: words, title: words, onclick: () => show(session) });
    button.setAttribute("aria-current", String(same(session, shown)));
    if (number < 9) button.setAttribute("aria-keyshortcuts", `Alt+${number + 1}`);
    if (!session.live) button.className = "past";
    return made("li", {}, button);
  });
  const focused = [...$("sessions").children].findIndex((item) => item.contains(document.activeElement));
  $("sessions").replaceChildren(...items);
  if (focused >= 0 && items[focused]) items[focused].firstChild.focus();
}

function same(one, other) {
  return one === other || Boolean(other && !one.source && one.id === other.id);
}

// ---- the one that is shown

function state() {
  const live = Boolean(shown && shown.live);
  $("lamp").dataset.state = $("lamp").textContent = live ? shown.state : "off";
  $("status").textContent = shown ? shown.status ?? "of the past" : "not connected";
  $("stop").disabled = !live;
  $("save").disabled = !shown;
  $("forget").disabled = !shown || live;
}

function addLine(line) {
  const text = made("span", { textContent: line.text });
  const when = made("time", { textContent: clock(line.second) });
  if (line.picture) when.append(made("img", { src: line.picture, alt: "the frame before it" }));
  const box = $("said"), below = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
  box.append(made("p", { className: line.kind }, when, text));
  while (box.children.length > LINES) box.firstChild.remove();
  if (line.kind === "speech") box.lastSpeech = text;
  if (below) box.scrollTop = box.scrollHeight;   // else the reader looks at something
}

function seen() {
  const frames = shown && shown.frames ? shown.frames : [];
  $("frames").replaceChildren(...frames.map((frame) => {
    const said = frame.decision === "speech" ? "speaks" : "silent";
    const item = made("li", {}, made("img", { src: frame.picture, alt: `frame of ${clock(frame.second)}` }),
      `${clock(frame.second)} ${said}`);
    item.dataset.decision = frame.decision;
    return item;
  }));
  $("frames").scrollLeft = $("frames").scrollWidth;
  strip(shown && shown.bars ? shown.bars : []);
}

function strip(all) {
  const canvas = $("strip"), width = canvas.width = canvas.clientWidth, height = canvas.height = canvas.clientHeight;
  const bars = all.slice(-Math.floor(width / 5)), context = canvas.getContext("2d");
  const top = Math.max(50, ...bars.map((bar) => bar.lag + bar.decision));
  bars.forEach((bar, number) => {
    const lag = bar.lag / top * height, decision = bar.decision / top * height;
    context.fillStyle = bar.speech ? "#e8590c" : "#868e96";
    context.fillRect(number * 5, height - decision, 4, decision);
    context.fillStyle = "#8886";
    context.fillRect(number * 5, height - decision - lag, 4, lag);
  });
  const last = bars[bars.length - 1];
  $("numbers").textContent = !last ? "\u00a0" :
    `decision ${last.decision.toFixed(0)} ms, lag ${last.lag.toFixed(0)} ms` +
    (shown.dropped ? `, ${shown.dropped} frames dropped` : "");
}

// ---- what the user does

$("camera").onclick = () => begin(Live.camera);
$("screen").onclick = () => begin(Live.screen);
$("choose").onclick = () => $("file").click();
$("file").onchange = () => {
  const file = $("file").files[0];
  $("file").value = "";   // the same file may be chosen again
  if (file) begin(() => new Recording(file));
};
$("stop").onclick = () => shown.stop();
$("cancel").onclick = () => shown && shown.live && shown.hush();
$("forget").onclick = () => {
  forget(record(shown).id);
  if (sessions.includes(shown)) sessions.splice(sessions.indexOf(shown), 1);
  show(sessions[0] ?? null);
};
$("save").onclick = () => {
  const blob = new Blob([JSON.stringify(record(shown), null, 1)], { type: "application/json" });
  const link = made("a", { href: URL.createObjectURL(blob), download: `${shown.name}.json` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
};
$("ask").onsubmit = (event) => {
  event.preventDefault();
  const text = $("prompt").value.trim();
  if (!text || !shown || !shown.live) return;
  shown.ask(text);
  $("prompt").value = "";
};

$("settings").onclick = () => {
  for (const [name, value] of Object.entries(using)) $("form").elements[name].value = value;
  $("dialog").showModal();
};
$("dialog").onclose = () => {
  if ($("dialog").returnValue !== "ok") return;
  for (const { name, type, value } of $("form").elements) {
    if (name) using = { ...using, [name]: type === "number" && value !== "" ? Number(value) : value };
  }
  keepSettings(using);
  if (shown && shown.live) {
    const { temperature, silence_bias, max_output_tokens } = using;
    shown.update({ temperature, silence_bias, max_output_tokens });
  }
};

document.addEventListener("keydown", (event) => {
  if ($("dialog").open) return;
  const writes = /^(INPUT|TEXTAREA)$/.test(document.activeElement.tagName);
  if (event.altKey && /^[1-9]$/.test(event.key)) {
    const session = everything()[Number(event.key) - 1];
    if (session) show(session);
  } else if (event.key === "Escape" && shown && shown.live) shown.hush();
  else if (event.key === "/" && !writes) $("prompt").focus();
  else return;
  event.preventDefault();
});

window.addEventListener("pagehide", () => sessions.filter((session) => session.live).forEach(remember));
show(null);
window.moss = { sessions, get shown() { return shown; } };   // for the console, and for tests
