// A session with the server: sends frames and questions, keeps what was seen and said.

const TICK = 100;                             // ms between looks at the clock
const AHEAD = 3;                              // frames of a file on their way before it waits
const RETRY = [250, 500, 1000, 2000, 4000];   // ms before connecting again
const FRAMES = 24;                            // of the last ones that are kept to be shown
const BARS = 400;
export const LINES = 500;

export class Session {
  /** changed(session, what): "state", "line", "text", "frame". */
  constructor(source, settings, changed) {
    Object.assign(this, { source, settings, changed });
    this.name = source.name;
    this.began = new Date();
    this.lines = [];    // {kind: user | speech | note, second, text, picture}
    this.frames = [];   // {second, picture, decision}
    this.bars = [];
    this.state = "off";
    this.status = "connecting";
    this.live = true;
    this.id = null;
    this.seq = this.tries = this.due = this.dropped = 0;
    this.sent = [];     // frames without a decision
    this.connect();
  }

  connect() {
    const scheme = location.protocol === "https:" ? "wss:" : "ws:";
    const base = `${scheme}//${location.host}${location.pathname.replace(/[^/]*$/, "")}v1/realtime`;
    const back = this.id ? `?session=${this.id}&last_seq=${this.seq}` : "";
    const key = this.settings.key;
    const protocols = key ? ["realtime", "openai-insecure-api-key." + key] : ["realtime"];
    this.socket = new WebSocket(base + back, protocols);
    this.socket.onmessage = (message) => this.take(JSON.parse(message.data));
    this.socket.onopen = () => { this.tries = 0; this.tell("connected"); };
    this.socket.onclose = (event) => this.closed(event);
  }

  closed(event) {
    if (!this.live) return;
    const silent = event.code === 1011 && event.reason.startsWith("keepalive");   // a slow network
    const lost = event.code === 1006 || silent || event.code === 1001 && !this.over;
    if (lost && this.id && this.tries < RETRY.length) {
      this.tell("connecting again");
      setTimeout(() => this.live && this.connect(), RETRY[this.tries++]);
      return;
    }
    this.end(event.code === 1000 ? "the session is over" : `closed: ${event.reason || event.code}`);
  }

  get open() { return this.live && this.socket.readyState === WebSocket.OPEN; }

  send(message) {
    if (this.open) this.socket.send(JSON.stringify(message));
  }

  ask(text) {
    this.send({ type: "conversation.item.create",
      item: { type: "message", role: "user", content: [{ type: "input_text", text }] } });
  }

  hush() { this.send({ type: "response.cancel" }); }

  /** Settings that may change at any time. */
  update(settings) {
    this.settings = { ...this.settings, ...settings };
    this.send({ type: "session.update", session: sampling(settings) });
  }

  stop() {
    this.send({ type: "session.close" });
    this.end("stopped");
  }

  end(why) {
    if (!this.live) return;
    this.live = false;
    clearInterval(this.timer);
    if (this.socket.readyState <= WebSocket.OPEN) this.socket.close(1000);
    this.source.stop();
    this.state = "off";
    this.tell(why);
  }

  tell(status) {
    this.status = status;
    this.changed(this, "state");
  }

  line(kind, second, text) {
    const last = this.frames[this.frames.length - 1];
    const picture = kind === "speech" && last ? last.picture : null;
    this.lines.push({ kind, second, text, picture });
    if (this.lines.length > LINES) this.lines.shift();
    this.changed(this, "line");
    return this.lines[this.lines.length - 1];
  }

  take(event) {
    this.seq = event.seq;
    const handle = HANDLERS[event.type];
    if (handle) handle(this, event);
  }

  start() {
    const { prompt, instructions } = this.settings;
    const first = { source: this.source.kind, prompt, instructions };
    this.send({ type: "session.update", session: { ...filled(first), ...sampling(this.settings) } });
    if (prompt) this.line("user", 0, prompt);
    this.state = "silent";
    this.tell("connected");
    this.timer = setInterval(() => this.tick(), TICK);
  }

  processed(event) {
    const known = this.sent.find((frame) => Math.abs(frame.second - event.frame_at) < 0.002);
    this.sent = this.sent.filter((frame) => frame.second > event.frame_at + 0.001);
    if (known) this.frames = [...this.frames, { ...known, decision: event.decision }].slice(-FRAMES);
    const bar = { lag: event.lag_ms, decision: event.decision_ms, speech: event.decision === "speech" };
    this.bars = [...this.bars, bar].slice(-BARS);
    this.changed(this, "frame");
  }

  async tick() {
    const { source, settings } = this;
    const behind = source.kind === "file" && this.sent.length >= AHEAD;
    source.wait(behind);
    if (behind || this.busy || this.ended || !this.open) return;
    if (source.ended) {
      this.ended = true;
      this.send({ type: "input_image_buffer.end" });
      this.tell(source.kind === "file" ? "end of the file" : "the source has ended");
      return;
    }
    if (!source.ready || source.second < this.due) return;
    const second = Math.round(source.second * 1000) / 1000;
    this.due = (Math.floor(second / settings.interval + 1e-6) + 1) * settings.interval;
    this.busy = true;
    const { blob, small } = await source.picture(settings.side);
    this.busy = false;
    if (!blob || !this.open) return;
    this.send({ type: "input_image_buffer.append", ts: second });
    this.socket.send(blob);
    this.sent.push({ second, picture: small });
  }
}

function filled(values) {
  return Object.fromEntries(Object.entries(values).filter(([, value]) => value !== "" && value != null));
}

function sampling({ temperature, silence_bias, max_output_tokens }) {
  return filled({ temperature, silence_bias, max_output_tokens });
}

const HANDLERS = {
  "session.created": (session, event) => {
    session.id = event.session.id;
    session.start();
  },
  "session.state": (session, event) => {
    session.state = event.state;
    session.changed(session, "state");
  },
  "response.created": (session, event) => { session.speech = session.line("speech", event.t_media, ""); },
  "response.output_text.delta": (session, event) => add(session, event.delta),
  "response.done": (session, event) => {
    if (event.status !== "completed") add(session, ` [${event.reason}]`);
  },
  "conversation.item.created": (session, event) => session.line("user", event.t_media, event.text),
  "input_frame.processed": (session, event) => session.processed(event),
  "input_frame.dropped": (session, event) => {
    session.sent.splice(0, event.count);
    session.dropped += event.count;
    session.changed(session, "frame");
  },
  "session.evicted": (session, event) =>
    session.line("note", event.t_media, "the oldest frames or turns were forgotten"),
  "session.resumed": (session, event) => session.line("note", event.t_media, "the session goes on"),
  "session.closed": (session) => { session.over = true; },
  "error": (session, event) => {
    session.sent.shift();   // if it is a frame's: no decision will come
    session.line("note", event.t_media, event.message);
  },
};

function add(session, text) {
  if (!session.speech) return;
  session.speech.text += text;
  session.changed(session, "text");
}
