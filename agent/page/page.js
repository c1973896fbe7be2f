// The operators' page: live values by server-sent events; what is two seconds old is shown as old by then.
"use strict";

const STALE_MS = 1500; // the agent speaks twice a second; with a look every 250 ms this keeps below two seconds
const HISTORY = 120;
const WORDS = { pass: "PASS", fail: "FAIL", error: "ERROR" };
const COLOURS = { pass: "#19b383", fail: "#ff7a2e", error: "#e07acb" };
const REASONS = {
  deadline: "too late",
  overrun: "too many parts waiting",
  worker_lost: "inspection process lost",
  out_of_memory: "out of GPU memory",
  camera_fault: "camera fault",
  bad_frame: "picture unusable",
  agent_restart: "agent restarted",
  paused: "inspection paused",
  internal: "internal error",
  clip_only: "quick decision, outline follows",
};
const id = (name) => document.getElementById(name);
const tiles = new Map();
let heardAt = 0;
let refused = false; // the agent wants a token that this browser does not have, or no longer
let first = null; // what the agent was when this page was opened
let clockGap = 0;
let boot = null; // of the agent that speaks
let cameras = {};
let starting = false;
let fails = [];
let opened = null;

// -- live values ---------------------------------------------------------------------------------------------

let source;
function listen() {
  source?.close();
  source = new EventSource("/events");
  source.onmessage = (event) => hear(JSON.parse(event.data));
  source.onerror = ({ target }) => { if (target.readyState === EventSource.CLOSED) askWhy(); };
}

// Events that end do not tell whether the agent has refused them or is not there.
async function askWhy() {
  const answer = await fetch("/", { method: "HEAD" }).catch(() => null);
  refused = answer?.status === 401;
}

// Tiles are made from what is heard first: where a restarted agent has other cameras, or another page, this one is old.
function isOutdated({ status, per_camera, page }) {
  const now = { boot: status.boot_id, made: [page, ...Object.keys(per_camera)].join(" ") };
  first ??= now;
  return now.boot !== first.boot && now.made !== first.made;
}

function hear(news) {
  if (news.status && isOutdated(news)) {
    source.close(); // another event would begin the reload again
    return void location.reload();
  }
  heardAt = performance.now();
  refused = false;
  clockGap = news.t / 1e6 - Date.now();
  document.body.classList.remove("waiting");
  if (news.status) {
    boot = news.status.boot_id;
    id("station").textContent = news.station;
    document.title = `${news.station} · flawline`;
    cameras = news.status.cameras;
    starting = news.status.state === "starting";
    addTiles(Object.keys(news.per_camera));
    showHealth(news.status);
    showCounters(news);
    showFails(news.fails);
  }
  for (const verdict of news.verdicts) tiles.get(verdict.camera)?.add(verdict);
  for (const tile of tiles.values()) tile.show();
  tick();
}

function tick() {
  const silent = performance.now() - heardAt;
  const stale = heardAt > 0 && silent > STALE_MS;
  document.body.classList.toggle("stale", stale);
  const link = id("link");
  link.classList.toggle("bad", stale || !heardAt);
  link.lastElementChild.textContent = stale ? `stale ${Math.round(silent / 1000)} s` : heardAt ? "live" : "connecting";
  mjpeg.mayRead = heardAt > 0 && !stale;
  id("alarm").hidden = !stale && !refused;
  if (refused) id("alarm").textContent = "NO DATA – a token is needed: open this page once with /?token=…";
  else if (stale) id("alarm").textContent = `NO DATA for ${Math.round(silent / 1000)} s – what you see is old`;
  for (const tile of tiles.values()) tile.age(stale);
  id("clock").textContent = new Date(Date.now() + clockGap).toLocaleTimeString("en-GB");
}
setInterval(tick, 250);
// The browser tries again by itself after most failures, but not after all of them.
setInterval(() => { if (performance.now() - heardAt > 5000) listen(); }, 5000);

// -- tiles ---------------------------------------------------------------------------------------------------

function reason(verdict) {
  if (verdict.reason) return REASONS[verdict.reason] || verdict.reason;
  if (verdict.result === "pass") return "no defect";
  return verdict.defects === 1 ? "1 defect" : verdict.defects ? `${verdict.defects} defects` : "";
}

function duration(ms) {
  const seconds = Math.round(ms / 1000);
  if (seconds < 100) return `${seconds} s`;
  return seconds < 6000 ? `${Math.round(seconds / 60)} min` : `${Math.round(seconds / 3600)} h`;
}

class Tile {
  constructor(name) {
    const root = id("tile").content.cloneNode(true).firstElementChild;
    this.root = root;
    this.name = name;
    this.history = [];
    this.find = (selector) => root.querySelector(selector);
    root.id = `camera-${name}`;
    this.find(".name").textContent = name;
    this.find("use").setAttribute("href", "#shape-none");
    id("tiles").append(root);
    this.plot = this.find(".plot");
    new ResizeObserver(() => this.drawPlot()).observe(this.plot);
    this.video = new CameraVideo(name, this.find(".screen"), (drawing) => this.showScore(drawing));
  }

  add(verdict) {
    const last = this.history[this.history.length - 1];
    if (last && verdict.seq <= last.seq) {
      if (last.boot === boot) return; // told again after a lost connection
      this.history.length = 0; // a journal that began anew
    }
    this.history.push({ boot, ...verdict });
    if (this.history.length > HISTORY) this.history.shift();
    this.changed = true;
  }

  show() {
    if (!this.changed) return;
    this.changed = false;
    const verdict = this.history[this.history.length - 1];
    this.root.dataset.result = verdict.result;
    this.root.dataset.seq = verdict.seq;
    if (!this.video.overlaid) this.showScore(verdict);
    this.drawPlot();
  }

  // Of the frame that the video shows, or of the last verdict where no drawing of a frame is there to tell; null: none.
  showScore(judged) {
    const { frame_id: frame = "", result = "none", score = null, threshold = null } = judged || {};
    this.find(".score").dataset.frame = frame;
    this.find(".score").dataset.result = result;
    this.find(".value").textContent = score === null ? "–" : score.toFixed(3);
    this.find(".fill").style.width = `${100 * (score || 0)}%`;
    this.find(".line").classList.toggle("set", threshold !== null);
    if (threshold === null) return;
    this.find(".line").style.left = `${100 * threshold}%`;
    this.find(".limit").textContent = `limit ${threshold.toFixed(3)}`;
  }

  // The plate: the last verdict while it is news; else what keeps news away. A line that only stands still is no
  // fault, but nobody should take its last verdict for a new one: it says how old it is.
  age(silent) {
    const verdict = this.history[this.history.length - 1];
    const camera = cameras[this.name];
    const lost = camera && !isWell(camera);
    let word = verdict ? WORDS[verdict.result] : "WAITING";
    let why = verdict ? reason(verdict) : "";
    if (silent) [word, why] = ["NO DATA", ""];
    else if (lost) [word, why] = [starting ? "STARTING" : "NO CAMERA", camera.error || ""];
    const old = Boolean(silent || lost);
    this.root.classList.toggle("stale", old);
    this.find("use").setAttribute("href", `#shape-${verdict && !old ? verdict.result : "none"}`);
    this.find(".word").textContent = word;
    this.find(".why").textContent = why;
    if (!verdict) return;
    const ms = Date.now() + clockGap - verdict.t_publish / 1e6;
    this.find(".ago").textContent = ms < STALE_MS ? "" : `${duration(ms)} ago`;
    // The video follows within that time; where the last part has no picture, it goes on showing an earlier one.
    const shown = this.video.overlaid ? this.video.shown : null;
    const next = shown && this.history.find((one) => one.seq > shown.seq);
    const other = next && Date.now() + clockGap - next.t_publish / 1e6 >= STALE_MS;
    this.find(".of").textContent = other ? `picture of no. ${shown.seq}` : "";
    this.find(".part").textContent = (verdict.part_id ? `part ${verdict.part_id}, ` : "") + `no. ${verdict.seq}`;
  }

  drawPlot() {
    const canvas = this.plot;
    const ratio = window.devicePixelRatio || 1;
    const [width, height] = [canvas.clientWidth, canvas.clientHeight];
    if (!width || !height) return;
    canvas.width = width * ratio;
    canvas.height = height * ratio;
    const pen = canvas.getContext("2d");
    pen.scale(ratio, ratio);
    const [left, right, top, bottom] = [36, width - 14, 8, height - 8];
    const y = (score) => bottom - score * (bottom - top);
    pen.font = "12px sans-serif";
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    pen.fillStyle = "#a9b4be";
    pen.strokeStyle = "#2b353e";
    for (const mark of [0, 0.5, 1]) {
      pen.fillText(mark.toFixed(1), left - 6, y(mark));
      pen.beginPath();
      pen.moveTo(left, y(mark));
      pen.lineTo(right, y(mark));
      pen.stroke();
    }
    const step = (right - left - 8) / (HISTORY - 1);
    const x = (index) => right - 4 - (this.history.length - 1 - index) * step;
    pen.strokeStyle = "#6cc0ff";
    pen.lineWidth = 2;
    pen.setLineDash([6, 4]);
    pen.beginPath();
    let pendown = false;
    this.history.forEach((verdict, index) => {
      if (verdict.threshold === null) return;
      pendown ? pen.lineTo(x(index), y(verdict.threshold)) : pen.moveTo(this.history.length < 2 ? left : x(index), y(verdict.threshold));
      pendown = true;
    });
    pen.stroke();
    pen.setLineDash([]);
    this.history.forEach((verdict, index) => {
      pen.fillStyle = pen.strokeStyle = COLOURS[verdict.result];
      const at = x(index);
      if (verdict.result === "error") {
        pen.beginPath();
        pen.moveTo(at, bottom - 9);
        pen.lineTo(at + 5, bottom);
        pen.lineTo(at - 5, bottom);
        pen.fill();
      } else if (verdict.result === "fail") {
        pen.fillRect(at - 3, y(verdict.score) - 3, 6, 6);
      } else {
        pen.beginPath();
        pen.arc(at, y(verdict.score), 2.5, 0, 7);
        pen.fill();
      }
    });
  }
}

function addTiles(names) {
  for (const name of names) if (!tiles.has(name)) tiles.set(name, new Tile(name));
  id("tiles").dataset.columns = names.length === 1 ? 1 : names.length <= 4 ? 2 : 3;
}

// -- health and counters -------------------------------------------------------------------------------------

// A folder that was shown to its end is no fault.
const isWell = (camera) => camera.up || camera.state === "ended";

function showHealth(status) {
  const entries = [[`line ${status.state}`, ["running", "starting"].includes(status.state)]];
  const worker = status.worker;
  entries.push([worker.ready && worker.healthy ? "worker" : worker.healthy ? "worker starts" : "worker fails", worker.ready && worker.healthy]);
  if (worker.restarts) entries[1][0] += ` (${worker.restarts} restarts)`;
  for (const [name, camera] of Object.entries(status.cameras)) {
    const word = { ended: " ended", closed: " opens" }[camera.state] || " lost";
    entries.push([camera.up ? name : name + word, isWell(camera) || (starting && camera.state === "closed")]);
  }
  if (!status.journal.ok) entries.push(["journal cannot be written", false]);
  const text = JSON.stringify(entries);
  if (id("health").dataset.text === text) return;
  id("health").dataset.text = text;
  id("health").replaceChildren(...entries.map(([words, good]) => {
    const item = document.createElement("li");
    item.classList.toggle("bad", !good);
    item.append(document.createElement("i"), words);
    return item;
  }));
}

function showCounters({ counts, since }) {
  const total = counts.pass + counts.fail + counts.error;
  for (const [result, count] of Object.entries(counts)) id(`count-${result}`).textContent = count.toLocaleString("en-GB");
  id("count-yield").textContent = total ? `${((100 * counts.pass) / total).toFixed(1)} %` : "–";
  id("count-since").textContent = new Date(since * 1000).toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit" });
}

// -- failed parts --------------------------------------------------------------------------------------------

function showFails(list) {
  if (list.length === fails.length && list[0]?.seq === fails[0]?.seq) return;
  fails = list;
  id("no-fails").hidden = list.length > 0;
  const known = new Map([...id("fails").children].map((item) => [item.dataset.seq, item]));
  id("fails").replaceChildren(...list.map((fail) => known.get(String(fail.seq)) || failItem(fail)));
  if (opened !== null) showNeighbours();
}

function failItem(fail) {
  const item = document.createElement("li");
  item.dataset.seq = fail.seq;
  const button = document.createElement("button");
  button.type = "button";
  button.setAttribute("aria-label", `Failed part ${fail.seq}, camera ${fail.camera}`);
  const image = document.createElement("img");
  image.loading = "lazy";
  image.alt = "";
  image.src = `/fails/${fail.seq}/thumb.jpg`;
  const words = document.createElement("span");
  const time = new Date(fail.t / 1e6).toLocaleTimeString("en-GB");
  for (const text of [tiles.size > 1 ? fail.camera : `no. ${fail.seq}`, time, fail.score.toFixed(3)]) words.append(Object.assign(document.createElement("b"), { textContent: text }));
  button.append(image, words);
  button.onclick = () => openFail(fail.seq);
  item.append(button);
  return item;
}

async function openFail(seq) {
  const answer = await fetch(`/fails/${seq}`);
  if (!answer.ok) return;
  const { verdict } = await answer.json();
  opened = seq;
  id("detail-title").textContent = `FAIL · ${verdict.camera} · no. ${verdict.seq}`;
  const hash = (text) => (text ? text.slice(0, 12) : "–");
  const made = verdict.provenance;
  const rows = [
    ["Time", new Date(verdict.t_publish / 1e6).toLocaleString("en-GB")],
    ["Part", verdict.part_id || "–"],
    ["Frame", verdict.frame_id],
    ["Score", verdict.score.toFixed(3)],
    ["Threshold", verdict.threshold.toFixed(3)],
    ["Decision", verdict.degraded ? "CLIP only" : "CLIP and SAM"],
    ...verdict.defects.slice(0, 6).map((defect, number) => [
      `Defect ${number + 1}`,
      `${defect.area_px} px` + (defect.area_mm2 ? `, ${defect.area_mm2.toFixed(2)} mm²` : "") + ` at ${defect.centroid.map(Math.round).join(", ")}`,
    ]),
    ...(verdict.defects.length > 6 ? [["", `and ${verdict.defects.length - 6} more`]] : []),
    ...Object.entries(verdict.stage_ms).map(([stage, time]) => [`Time ${stage}`, `${time.toFixed(1)} ms`]),
    ["Recipe", `${verdict.recipe.id} v${verdict.recipe.version} ${hash(made.recipe_sha256)}`],
    ["Bundle", `${made.bundle} ${hash(made.bundle_sha256)}`],
    ["Memory", hash(made.memory_sha256)],
    ["Agent", made.agent],
  ];
  id("detail-numbers").replaceChildren(...rows.flatMap(([name, value]) => [
    Object.assign(document.createElement("dt"), { textContent: name }),
    Object.assign(document.createElement("dd"), { textContent: value }),
  ]));
  showFile("marked.jpg");
  showNeighbours();
  if (!id("detail").open) id("detail").showModal();
}

const CAPTIONS = {
  "marked.jpg": "Outline of the mask and boxes of the defects",
  "picture.jpg": "The picture as it was judged, at preview size",
  "map.png": "Anomaly map on the fixed scale from 0 (black) to 1 (yellow)",
  "mask.png": "Mask: pixels that belong to a defect",
};

function showFile(name) {
  id("detail-picture").src = `/fails/${opened}/${name}`;
  id("detail-picture").alt = CAPTIONS[name];
  id("detail-caption").textContent = CAPTIONS[name];
  for (const tab of document.querySelectorAll(".tabs button")) tab.setAttribute("aria-pressed", tab.dataset.file === name);
}

const neighbour = (step) => fails[fails.findIndex((fail) => fail.seq === opened) + step]?.seq;

function showNeighbours() {
  const known = fails.some((fail) => fail.seq === opened);
  id("detail-newer").disabled = !known || neighbour(-1) === undefined;
  id("detail-older").disabled = !known || neighbour(1) === undefined;
}

for (const tab of document.querySelectorAll(".tabs button")) tab.onclick = () => showFile(tab.dataset.file);
id("detail-close").onclick = () => id("detail").close();
id("detail-newer").onclick = () => openFail(neighbour(-1));
id("detail-older").onclick = () => openFail(neighbour(1));
id("detail").onclose = () => { opened = null; };
id("detail").onclick = (event) => { if (event.target === id("detail")) id("detail").close(); };

// -- layers and keys -----------------------------------------------------------------------------------------

function toggle(layer) {
  layers[layer] = !layers[layer];
  document.querySelector(`[data-layer="${layer}"]`).setAttribute("aria-pressed", layers[layer]);
  for (const tile of tiles.values()) tile.video.draw();
}
for (const button of document.querySelectorAll("[data-layer]")) button.onclick = () => toggle(button.dataset.layer);

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  const key = event.key.toLowerCase();
  if (id("detail").open) {
    const step = { arrowleft: -1, arrowup: -1, arrowright: 1, arrowdown: 1 }[key];
    if (step && neighbour(step) !== undefined) openFail(neighbour(step));
    return;
  }
  const layer = { o: "outlines", b: "boxes", p: "points" }[key];
  if (layer) toggle(layer);
  else if (key === "f" && fails.length) openFail(fails[0].seq);
});

listen();
