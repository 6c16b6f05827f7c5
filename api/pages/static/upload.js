// Hashes a file, sends it in parts, goes on after a broken connection, and has it imported.
"use strict";

const form = document.getElementById("upload"), bar = document.getElementById("bar");
const told = document.getElementById("told"), result = document.getElementById("result");
const STEP = 4 << 20, PART = 8 << 20, TRIES = 6, WHOLE = 256 << 20;

function tell(text, fraction) {
  told.textContent = text;
  bar.hidden = fraction === undefined;
  if (fraction === null) bar.removeAttribute("value");
  else if (fraction !== undefined) bar.value = fraction;
}

async function hash(file) {
  // Quicker where the browser offers it (not on plain http) and the file fits in memory.
  if (window.crypto.subtle && file.size <= WHOLE) {
    tell("Hashing …", null);
    const sum = new Uint8Array(await crypto.subtle.digest("SHA-256", await file.arrayBuffer()));
    return Array.from(sum, (byte) => byte.toString(16).padStart(2, "0")).join("");
  }
  const sha = new Sha256();
  for (let at = 0; at < file.size; at += STEP) {
    sha.update(new Uint8Array(await file.slice(at, at + STEP).arrayBuffer()));
    tell("Hashing …", Math.min(1, (at + STEP) / file.size));
  }
  return sha.hex();
}

async function call(method, path, options = {}) {
  const answer = await fetch(path, { method, ...options });
  const body = answer.status === 204 ? null : await answer.json();
  if (!answer.ok) throw Object.assign(new Error(body.detail), { status: answer.status, again: body.retryable });
  return body;
}

async function sendParts(upload, file) {
  let failed = 0;
  while (upload.received_bytes < file.size) {
    const at = upload.received_bytes, limit = Math.min(PART, upload.part_limit_bytes);
    tell("Sending …", at / file.size);
    try {
      upload = await call("PATCH", `/v1/uploads/${upload.id}`, {
        headers: { "Upload-Offset": String(at), "Content-Type": "application/octet-stream" },
        body: file.slice(at, at + limit),
      });
      failed = 0;
    } catch (error) {
      if (++failed >= TRIES || (error.status && error.status !== 409 && error.status < 500 && !error.again)) throw error;
      await new Promise((done) => setTimeout(done, 500 * 2 ** failed));
      upload = await call("GET", `/v1/uploads/${upload.id}`);
    }
  }
  return upload;
}

function link(text, href) {
  const made = document.createElement("a");
  made.className = "button small quiet";
  made.textContent = text;
  made.href = href;
  return made;
}

function showArtifact(artifact) {
  const box = document.createElement("div"), hash = document.createElement("code");
  const title = document.createElement("strong"), uses = document.createElement("p");
  box.className = "notice good";
  title.textContent = `${artifact.file_name} · ${artifact.format} · `;
  hash.textContent = artifact.sha256;
  const all = JSON.parse(form.dataset.uses);
  for (const [kind, field] of all[artifact.format] || []) {
    uses.append(link(`Use in ${kind}`, `/submit?kind=${kind}&input=${field}:${artifact.sha256}`), " ");
  }
  const facts = document.createElement("pre");
  facts.textContent = JSON.stringify(artifact.meta, null, 2);
  box.append(title, hash, uses, facts);
  result.prepend(box);
}

function showError(error) {
  const box = document.createElement("div");
  box.className = "notice bad";
  box.setAttribute("role", "alert");
  box.textContent = error.message;
  result.prepend(box);
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const file = document.getElementById("file").files[0], button = form.querySelector("button");
  button.disabled = true;
  try {
    if (!file.size) throw new Error("The file is empty.");
    const about = { file_name: file.name, size_bytes: file.size, sha256: await hash(file) };
    const upload = await call("POST", "/v1/uploads", {
      headers: { "Content-Type": "application/json" }, body: JSON.stringify(about),
    });
    await sendParts(upload, file);
    tell("Checking and importing …", null);
    showArtifact(await call("POST", `/v1/uploads/${upload.id}/complete`));
    form.reset();
  } catch (error) {
    showError(error);
  }
  tell("");
  button.disabled = false;
});
