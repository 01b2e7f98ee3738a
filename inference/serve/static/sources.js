// Where pictures come from: a camera, a screen, a file. Each has a video element of its own.

const JPEG_QUALITY = 0.85;
const THUMBNAIL = { side: 96, quality: 0.6 };

function element() {
  const video = document.createElement("video");
  video.muted = true;
  video.playsInline = true;
  return video;
}

function drawn(video, side) {
  const scale = Math.min(1, side / Math.max(video.videoWidth, video.videoHeight));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(video.videoWidth * scale));
  canvas.height = Math.max(1, Math.round(video.videoHeight * scale));
  canvas.getContext("2d").drawImage(video, 0, 0, canvas.width, canvas.height);
  return canvas;
}

class Source {
  constructor(kind, name) {
    this.kind = kind;   // "live" drops what is late, "file" waits
    this.name = name;
    this.video = element();
  }

  get ready() { return this.video.readyState >= 2; }

  /** A JPEG of the picture that is shown now, its longer side at most `side` pixels; a small one. */
  async picture(side) {
    const canvas = drawn(this.video, side);
    const small = drawn(this.video, THUMBNAIL.side).toDataURL("image/jpeg", THUMBNAIL.quality);
    const blob = await new Promise((done) => canvas.toBlob(done, "image/jpeg", JPEG_QUALITY));
    return { blob, small };
  }
}

export class Live extends Source {
  constructor(stream, name) {
    super("live", name);
    this.began = performance.now();
    this.stream = stream;
    this.video.srcObject = stream;
    this.started = this.video.play();
  }

  static async camera() {
    return new Live(await opened("getUserMedia", { video: { width: 1280 }, audio: false }), "Camera");
  }

  static async screen() {
    return new Live(await opened("getDisplayMedia", { video: true, audio: false }), "Screen");
  }

  get second() { return (performance.now() - this.began) / 1000; }

  /** Whether the camera or the user has ended it. */
  get ended() { return this.stream.getTracks().every((track) => track.readyState === "ended"); }

  wait() {}

  stop() {
    this.stream.getTracks().forEach((track) => track.stop());
    this.video.pause();
  }
}

export class Recording extends Source {
  constructor(file) {
    super("file", file.name);
    this.video.src = URL.createObjectURL(file);
    this.started = this.video.play();
  }

  get second() { return this.video.currentTime; }
  get ended() { return this.video.ended; }

  /** Stands still while the model is behind. */
  wait(behind) {
    if (this.video.ended || behind === this.video.paused) return;
    if (behind) this.video.pause();
    else this.video.play().catch(() => {});
  }

  stop() {
    this.video.pause();
    URL.revokeObjectURL(this.video.src);
  }
}

async function opened(how, options) {
  if (!navigator.mediaDevices || !navigator.mediaDevices[how]) {
    throw new Error("browsers give it to pages over HTTPS or of this machine alone: start the server with --ssl_certfile");
  }
  return navigator.mediaDevices[how](options);
}
