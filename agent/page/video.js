// One camera's video: WebRTC by WHEP, MJPEG where that does not come up, and what is drawn over the picture.
"use strict";

const UP_WITHIN_MS = 3000;
const FROZEN_MS = 1500; // a video that stands still is marked as old,
const DEAD_MS = 3000; // and then asked for again
const TRY_AGAIN_MS = 15000;
const READ_AGAIN_MS = 1000;
const MOST_READERS = 4; // a browser opens six connections to an address: live values and requests need theirs
const KEPT_DRAWINGS = 64;
const VOTES = 4;
const KINDS = { pass: "#39e0a8", fail: "#ff7a2e", error: "#f08adf" };

const layers = { outlines: true, boxes: true, points: false };
const mjpeg = { readers: 0, mayRead: false }; // of all tiles; the page says whether the agent is heard
const pause = (ms) => new Promise((done) => setTimeout(done, ms));

// The JPEG files of a multipart stream: each part tells its length.
async function* picturesOf(reader) {
  let data = new Uint8Array();
  for (;;) {
    const head = new TextDecoder("latin1").decode(data.subarray(0, 512));
    const begin = head.indexOf("\r\n\r\n") + 4;
    const length = Number(head.match(/Content-Length: (\d+)/)?.[1]);
    if (begin >= 4 && data.length >= begin + length) {
      yield new Blob([data.subarray(begin, begin + length)], { type: "image/jpeg" });
      data = data.slice(begin + length + 2);
      continue;
    }
    const { value, done } = await reader.read();
    if (done) return;
    const longer = new Uint8Array(data.length + value.length);
    longer.set(data);
    longer.set(value, data.length);
    data = longer;
  }
}

class CameraVideo {
  // `onDrawing` is told whose frame is shown: the frame's drawing, or null while that is not known.
  constructor(name, screen, onDrawing) {
    this.name = name;
    this.screen = screen;
    this.onDrawing = onDrawing;
    this.video = screen.querySelector("video");
    this.image = screen.querySelector(".mjpeg");
    this.canvas = screen.querySelector(".overlay");
    this.label = screen.querySelector(".transport");
    this.peer = null;
    this.session = null;
    this.attempt = 0;
    this.frameAt = 0;
    this.shown = null;
    this.stamp = undefined;
    this.overlaid = false;
    new ResizeObserver(() => this.draw()).observe(screen);
    this.connect();
    setInterval(() => this.watch(), 250);
    addEventListener("pagehide", () => this.leave());
  }

  // WebRTC first; who sees no picture in three seconds gets MJPEG. A WebRTC that comes up later takes over, and one
  // that does not gets another try.
  async connect() {
    const attempt = ++this.attempt;
    this.leave();
    this.triedAt = performance.now();
    this.drawings = [];
    this.votes = new Map();
    this.offset = null;
    this.missed = 0;
    if (this.image.hidden) this.say("connecting");
    clearTimeout(this.again);
    const limit = setTimeout(() => this.fallBack(attempt), UP_WITHIN_MS);
    try {
      const peer = (this.peer = new RTCPeerConnection({ iceServers: [] }));
      peer.addTransceiver("video", { direction: "recvonly" });
      const channel = peer.createDataChannel("overlay", { ordered: false, maxRetransmits: 0 });
      channel.onmessage = (event) => this.take(JSON.parse(event.data));
      peer.ontrack = (event) => {
        if ("playoutDelayHint" in event.receiver) event.receiver.playoutDelayHint = 0;
        this.video.srcObject = new MediaStream([event.track]);
        this.video.play().catch(() => {});
        this.follow(attempt, limit);
      };
      await peer.setLocalDescription(await peer.createOffer());
      // The connection and the viewer's place that MJPEG holds are for this try. Its pictures go on meanwhile.
      this.asking = true;
      this.reading?.abort();
      const answer = await fetch(`/${this.name}/whep`, {
        method: "POST",
        headers: { "Content-Type": "application/sdp" },
        body: peer.localDescription.sdp,
        signal: AbortSignal.timeout(UP_WITHIN_MS),
      }).finally(() => { this.asking = false; });
      if (answer.status !== 201) throw new Error(`whep ${answer.status}`);
      const session = answer.headers.get("Location");
      if (attempt !== this.attempt) return void fetch(session, { method: "DELETE" });
      this.session = session;
      await peer.setRemoteDescription({ type: "answer", sdp: await answer.text() });
    } catch (error) {
      clearTimeout(limit);
      if (attempt !== this.attempt) return;
      this.leave();
      this.fallBack(attempt);
    }
  }

  follow(attempt, limit) {
    const onFrame = (now, about) => {
      if (attempt !== this.attempt) return;
      this.video.requestVideoFrameCallback(onFrame);
      if (about.width < 16) return; // what a browser shows of a track without pictures
      clearTimeout(limit);
      clearTimeout(this.again);
      if (!this.image.hidden) {
        this.image.hidden = true;
        this.reading?.abort();
      }
      this.seen("");
      this.match(about.rtpTimestamp);
    };
    this.video.requestVideoFrameCallback(onFrame);
  }

  fallBack(attempt) {
    if (attempt !== this.attempt) return;
    this.overlaid = false;
    this.shown = null;
    this.draw();
    this.say("MJPEG");
    if (this.image.hidden) {
      this.image.hidden = false;
      this.readPictures();
    }
    clearTimeout(this.again);
    this.again = setTimeout(() => this.connect(), TRY_AGAIN_MS);
  }

  // MJPEG is read here and not by the <img>, which would not tell that its pictures have stopped coming. The overlay
  // is burnt in: the pictures carry no number by which a page could match it.
  async readPictures() {
    const turn = (this.turn = (this.turn || 0) + 1);
    const wanted = () => !this.image.hidden && turn === this.turn;
    while (wanted()) {
      // After a restart of the agent the readers of many tiles would take every connection before the live values.
      if (this.asking || !mjpeg.mayRead || mjpeg.readers >= MOST_READERS) {
        if (mjpeg.readers >= MOST_READERS && !this.frameAt) this.say(`no WebRTC: ${MOST_READERS} videos at most`);
        await pause(50);
        continue;
      }
      const reading = (this.reading = new AbortController());
      this.triedAt = performance.now();
      mjpeg.readers += 1;
      try {
        const answer = await fetch(`/${this.name}/mjpeg?burn=1`, { signal: reading.signal });
        if (!answer.ok) throw new Error(`mjpeg ${answer.status}`);
        for await (const picture of picturesOf(answer.body.getReader())) {
          const url = URL.createObjectURL(picture);
          this.image.src = url;
          await this.image.decode();
          URL.revokeObjectURL(url);
          if (!this.image.hidden) this.seen("MJPEG");
        }
      } catch {
        // Whatever ended it, `watch` tells the operator; here it is begun again.
      } finally {
        reading.abort();
        mjpeg.readers -= 1;
      }
      if (!this.asking) await pause(READ_AGAIN_MS);
    }
  }

  seen(transport) {
    this.frameAt = performance.now();
    this.screen.classList.remove("frozen");
    this.say(transport);
  }

  // The agent repeats its last picture twice a second, so that a video which stands still is a broken one.
  watch() {
    if (!this.frameAt) return;
    if (document.hidden) this.frameAt = performance.now(); // no browser plays what nobody sees
    const now = performance.now();
    const still = now - this.frameAt;
    if (still > FROZEN_MS) {
      this.screen.classList.add("frozen");
      this.say("NO VIDEO");
    }
    if (still < DEAD_MS || now - this.triedAt < DEAD_MS) return;
    if (this.image.hidden) this.connect();
    else this.reading?.abort();
  }

  leave() {
    if (this.session) fetch(this.session, { method: "DELETE", keepalive: true }).catch(() => {});
    this.session = null;
    if (this.peer) this.peer.close();
    this.peer = null;
  }

  say(text) {
    this.label.textContent = text;
  }

  take(drawing) {
    this.drawings.push(drawing);
    if (this.drawings.length > KEPT_DRAWINGS) this.drawings.shift();
    // It came after its frame.
    if (this.overlaid && !this.shown && this.of(this.stamp) === drawing) this.show(drawing);
  }

  of(stamp) {
    if (this.offset === null) return undefined;
    return this.drawings.find((drawing) => (drawing.ts + this.offset) >>> 0 === stamp);
  }

  // Which drawing belongs to this frame? RTP adds a random offset to the stream's time stamps. It is the one
  // difference between frames and drawings that comes up again and again, because no two distances are alike. Until
  // it is known nothing is drawn: a drawing over another frame would point at what is not there.
  match(stamp) {
    this.overlaid = true;
    this.stamp = stamp;
    // Such a browser tells nothing of its frames: the newest drawing may be ahead of the picture.
    if (stamp === undefined) return this.show(this.drawings[this.drawings.length - 1]);
    if (this.offset === null) {
      for (const drawing of this.drawings) {
        const offset = (stamp - drawing.ts) >>> 0;
        const votes = (this.votes.get(offset) || 0) + 1;
        this.votes.set(offset, votes);
        if (votes >= VOTES) this.offset = offset;
      }
      if (this.votes.size > 4096) this.votes.clear();
    }
    const mine = this.of(stamp);
    if (this.offset !== null) this.missed = mine ? 0 : this.missed + 1;
    if (this.missed > 5) {
      this.offset = null;
      this.votes.clear();
      this.missed = 0;
    }
    this.show(mine);
  }

  show(drawing) {
    this.shown = drawing || null;
    this.draw();
    this.onDrawing(this.shown);
    this.canvas.dataset.frame = drawing ? drawing.frame_id : "";
    this.canvas.dataset.grabbed = drawing?.t_grab ? drawing.t_grab / 1e6 : "";
    this.canvas.dataset.matched = this.offset !== null;
  }

  draw() {
    const { clientWidth: width, clientHeight: height } = this.canvas;
    const ratio = window.devicePixelRatio || 1;
    if (this.canvas.width !== Math.round(width * ratio)) this.canvas.width = Math.round(width * ratio);
    if (this.canvas.height !== Math.round(height * ratio)) this.canvas.height = Math.round(height * ratio);
    const pen = this.canvas.getContext("2d");
    pen.setTransform(1, 0, 0, 1, 0, 0);
    pen.clearRect(0, 0, this.canvas.width, this.canvas.height);
    const drawing = this.shown;
    if (!drawing || !this.image.hidden) return;
    const [w, h] = drawing.size;
    const scale = Math.min(this.canvas.width / w, this.canvas.height / h);
    const left = (this.canvas.width - w * scale) / 2;
    const top = (this.canvas.height - h * scale) / 2;
    const x = (value) => left + value * scale;
    const y = (value) => top + value * scale;
    const across = w / drawing.frame[0];
    const down = h / drawing.frame[1];
    pen.lineJoin = "round";
    const stroke = (path, colour, thick) => {
      pen.strokeStyle = "rgb(0 0 0 / .7)";
      pen.lineWidth = (thick + 2) * ratio;
      pen.stroke(path);
      pen.strokeStyle = colour;
      pen.lineWidth = thick * ratio;
      pen.stroke(path);
    };
    if (layers.boxes) {
      const path = new Path2D();
      const air = 5 * ratio;
      for (const [bx, by, bw, bh] of drawing.boxes)
        path.rect(x(bx * across) - air, y(by * down) - air, bw * across * scale + 2 * air, bh * down * scale + 2 * air);
      stroke(path, KINDS[drawing.result], 2);
    }
    if (layers.outlines) {
      const path = new Path2D();
      // Corners are the middles of preview pixels.
      for (const corners of drawing.outlines) {
        for (let i = 0; i < corners.length; i += 2) path.lineTo(x(corners[i] + 0.5), y(corners[i + 1] + 0.5));
        path.closePath();
        path.moveTo(NaN, NaN);
      }
      stroke(path, "#ffe040", 2.5);
    }
    if (layers.points) {
      for (const [px, py, label] of drawing.points) {
        const path = new Path2D();
        const cx = x(px * across);
        const cy = y(py * down);
        const arm = 7 * ratio;
        path.moveTo(cx - arm, cy);
        path.lineTo(cx + arm, cy);
        if (label) {
          path.moveTo(cx, cy - arm);
          path.lineTo(cx, cy + arm);
        }
        stroke(path, label ? "#6cff8d" : "#6cc0ff", 3);
      }
    }
  }
}
