// Keeps marked parts of a page current by fetching the page again. Instants in the reader's zone.
"use strict";

function localTimes(root) {
  for (const time of root.querySelectorAll("time[datetime]")) {
    const at = new Date(time.dateTime);
    if (!Number.isNaN(at.getTime())) {
      time.textContent = at.toLocaleString();
      time.title = time.dateTime;
    }
  }
}

async function refresh() {
  const answer = await fetch(location.href, { headers: { Accept: "text/html" } });
  if (answer.redirected) { location.reload(); return; }
  if (!answer.ok) return;
  const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
  localTimes(fresh);
  for (const part of document.querySelectorAll("[data-live]")) {
    const now = fresh.getElementById(part.id);
    // Focus and an unchanged look are left in peace.
    if (now && now.innerHTML !== part.innerHTML && !part.contains(document.activeElement)) {
      part.replaceChildren(...document.importNode(now, true).childNodes);
    }
  }
}

let asked = null;
function refreshSoon() {
  if (asked === null) {
    asked = setTimeout(() => { asked = null; refresh().catch(() => {}); }, 300);
  }
}

localTimes(document);
for (const part of document.querySelectorAll("[data-every]")) {
  setInterval(() => { if (!document.hidden) refresh().catch(() => {}); }, Number(part.dataset.every));
}
