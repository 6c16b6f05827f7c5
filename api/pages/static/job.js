// Follows one job through its event stream.
"use strict";

const place = document.getElementById("curves"), job = place.dataset.job;
const bar = document.getElementById("bar"), told = document.getElementById("told");
const log = document.getElementById("events");
const LAST = ["job.succeeded", "job.failed", "job.cancelled"];
const TYPES = ["job.submitted", "job.planned", "job.took_over", "job.started", "job.changed", "job.pausing", "job.paused",
  "job.unpaused", "job.resumed", "job.cancelling", "chunk.done", "chunk.failed", "chunk.handed_back", "chunk.cancelled",
  "node.excluded", ...LAST];

function lasting(seconds) {
  if (seconds < 60) return `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
  const whole = Math.round(seconds), pad = (n) => String(n).padStart(2, "0");
  return `${Math.floor(whole / 3600)}:${pad(Math.floor(whole / 60) % 60)}:${pad(whole % 60)}`;
}

function showProgress(now) {
  bar.value = now.fraction;
  if (now.waits_for) refreshSoon();
  if (now.total === null) return;
  const parts = [`${(now.fraction * 100).toFixed(1)} %`, `${Math.floor(now.done * 10) / 10} of ${now.total} chunks`];
  if (now.stage) parts.push(now.stage);
  if (now.eta_s !== null) parts.push(`${lasting(now.eta_s)} left`);
  told.textContent = parts.join(" · ");
}

const LOOKS = { "job.pausing": "pausing", "job.paused": "paused", "job.unpaused": "queued", "job.started": "running",
  "job.resumed": "running", "job.cancelling": "cancelling" };

function note(event) {
  if (event.type in LOOKS) bar.className = LOOKS[event.type];
  const line = document.createElement("li"), kind = document.createElement("strong");
  const data = document.createElement("code");
  kind.textContent = event.type;
  data.textContent = event.data === "{}" ? "" : event.data;
  line.append(new Date().toLocaleString(), " ", kind, " ", data);
  log.append(line);
  while (log.childElementCount > 1000) log.firstElementChild.remove();
  refreshSoon();
  drawSoon();
}

let drawing = null;
function drawSoon() {
  if (drawing === null) drawing = setTimeout(() => { drawing = null; drawCurves(job).catch(() => {}); }, 500);
}

drawCurves(job).catch(() => {});
if (place.dataset.over === "no") {
  const stream = new EventSource(`/v1/jobs/${job}/events?after=${place.dataset.after}`);
  stream.addEventListener("progress", (event) => showProgress(JSON.parse(event.data)));
  stream.addEventListener("reset", () => log.replaceChildren());
  for (const type of TYPES) stream.addEventListener(type, note);
  for (const type of LAST) {
    stream.addEventListener(type, () => {
      stream.close();
      bar.className = type.slice(4);
    });
  }
}
