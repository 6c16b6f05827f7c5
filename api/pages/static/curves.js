// Draws curves as SVG: one plot per metric, no library.
"use strict";

const SVG = "http://www.w3.org/2000/svg";
const WIDE = 400, HIGH = 180, LEFT = 52, RIGHT = 8, TOP = 8, BOTTOM = 22, MOST = 600;

function shape(name, facts, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(facts)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function short(value) {
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e5)) return value.toExponential(1);
  return String(Number(value.toPrecision(4)));
}

// Least and greatest of each bucket: a spike stays a spike however long the curve is.
function thin(points) {
  if (points.length <= MOST) return points;
  const step = Math.ceil(points.length / (MOST / 2)), kept = [];
  for (let at = 0; at < points.length; at += step) {
    const part = points.slice(at, at + step);
    const low = part.reduce((a, b) => (b[1] < a[1] ? b : a));
    const high = part.reduce((a, b) => (b[1] > a[1] ? b : a));
    kept.push(...(low[0] < high[0] ? [low, high] : low === high ? [low] : [high, low]));
  }
  return kept;
}

function plot(name, all) {
  const points = thin(all.filter((point) => Number.isFinite(point[1])));
  const figure = document.createElement("figure");
  figure.className = "plot card";
  const caption = document.createElement("figcaption");
  const title = document.createElement("strong"), last = document.createElement("span");
  title.textContent = name;
  last.textContent = points.length ? short(points[points.length - 1][1]) : "";
  caption.append(title, last);
  figure.append(caption);
  if (!points.length) return figure;
  const xs = points.map((p) => p[0]), ys = points.map((p) => p[1]);
  const x0 = Math.min(...xs), x1 = Math.max(...xs), y0 = Math.min(...ys), y1 = Math.max(...ys);
  const px = (x) => LEFT + ((x - x0) / (x1 - x0 || 1)) * (WIDE - LEFT - RIGHT);
  const py = (y) => y1 === y0 ? (TOP + HIGH - BOTTOM) / 2
    : HIGH - BOTTOM - ((y - y0) / (y1 - y0)) * (HIGH - TOP - BOTTOM);
  const told = `${name}: ${short(ys[0])} at step ${x0}, ${short(ys[ys.length - 1])} at step ${x1}`;
  const svg = shape("svg", { viewBox: `0 0 ${WIDE} ${HIGH}`, role: "img", "aria-label": told });
  for (const y of y1 === y0 ? [y0] : [y0, (y0 + y1) / 2, y1]) {
    svg.append(shape("line", { class: "axis", x1: LEFT, x2: WIDE - RIGHT, y1: py(y), y2: py(y) }));
    svg.append(shape("text", { x: LEFT - 6, y: py(y) + 4, "text-anchor": "end" }, short(y)));
  }
  svg.append(shape("text", { x: LEFT, y: HIGH - 6 }, x0));
  if (x1 !== x0) svg.append(shape("text", { x: WIDE - RIGHT, y: HIGH - 6, "text-anchor": "end" }, x1));
  const path = points.map((p) => `${px(p[0]).toFixed(1)},${py(p[1]).toFixed(1)}`).join(" ");
  svg.append(shape("polyline", { class: "line", points: path }));
  const end = points[points.length - 1];
  svg.append(shape("circle", { class: "dot", r: 3, cx: px(end[0]), cy: py(end[1]) }));
  figure.append(svg);
  return figure;
}

async function drawCurves(job) {
  const answer = await fetch(`/v1/jobs/${job}/metrics`);
  if (!answer.ok) return;
  const { metrics } = await answer.json();
  const names = Object.keys(metrics);
  document.getElementById("curves").hidden = names.length === 0;
  document.getElementById("plots").replaceChildren(...names.map((name) => plot(name, metrics[name])));
}
