// What only the browser can do: pick and send files, follow the end of the conversation, reveal the source.
"use strict";

const aiirwkv = (() => {
  const room = () => document.querySelector(".room");
  const zone = () => document.querySelector(".drop");

  // Files on their way. One request at a time: the server indexes them one after the other anyway.
  const uploads = new Map();
  let keys = Date.now();
  let queue = Promise.resolve();

  const tell = (upload, more) => {
    const { key, name, collection, sent, total } = upload;
    emitEvent("upload", { key, name, collection, sent, total, ...more });
  };

  const transfer = (upload) =>
    new Promise((done) => {
      if (upload.cancelled) return done();
      const limit = Number(room().dataset.limit);
      if (upload.total > limit) {
        tell(upload, { error: `larger than ${Math.round(limit / 1e6)} MB, which is the limit for one file` });
        return done();
      }
      const request = (upload.request = new XMLHttpRequest());
      const query = new URLSearchParams({ collection: upload.collection, name: upload.name });
      let told = 0;
      request.upload.onprogress = (event) => {
        upload.sent = event.loaded;
        if (Date.now() - told < 200) return;
        told = Date.now();
        tell(upload);
      };
      request.onloadend = () => {
        let error = "";
        if (request.status !== 200 && !upload.cancelled) {
          try {
            error = JSON.parse(request.responseText).error;
          } catch {
            error = "the connection broke; nothing was stored";
          }
        }
        if (!error) uploads.delete(upload.key);
        tell(upload, { error, over: true });
        done();
      };
      request.open("PUT", `/upload?${query}`);
      request.send(upload.file);
    });

  const enqueue = (upload) => {
    upload.sent = 0;
    upload.cancelled = false;
    uploads.set(upload.key, upload);
    tell(upload);
    queue = queue.then(() => transfer(upload));
  };

  const send = (files) => {
    for (const file of files) {
      const collection = zone().dataset.collection;
      enqueue({ key: keys++, file, name: file.name, collection, sent: 0, total: file.size });
    }
  };

  const again = (key) => uploads.has(key) && enqueue(uploads.get(key));

  const cancel = (key) => {
    const upload = uploads.get(key);
    if (!upload) return;
    upload.cancelled = true;
    if (upload.request) upload.request.abort();
    uploads.delete(key);
    tell(upload, { over: true });
  };

  const pick = () => {
    const input = document.createElement("input");
    input.type = "file";
    input.multiple = true;
    input.onchange = () => send(input.files);
    input.click();
  };

  // A dropped folder brings the files in it.
  const walk = async (entry) => {
    if (entry.isFile) return [await new Promise((done, fail) => entry.file(done, fail))];
    const reader = entry.createReader();
    const files = [];
    for (;;) {
      const entries = await new Promise((done, fail) => reader.readEntries(done, fail));
      if (!entries.length) return files;
      for (const inner of entries) files.push(...(await walk(inner)));
    }
  };

  let inside = 0;
  const dragging = (on) => room()?.classList.toggle("dragging", on);
  const carries = (event) => event.dataTransfer?.types.includes("Files");
  addEventListener("dragenter", (event) => carries(event) && dragging(++inside > 0));
  addEventListener("dragleave", (event) => carries(event) && dragging(--inside > 0));
  addEventListener("dragover", (event) => carries(event) && event.preventDefault());
  addEventListener("drop", async (event) => {
    if (!carries(event)) return;
    event.preventDefault();
    dragging((inside = 0) > 0);
    const entries = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry()).filter(Boolean);
    const files = [...event.dataTransfer.files];
    send(entries.some((entry) => entry.isDirectory) ? (await Promise.all(entries.map(walk))).flat() : files);
  });

  // The view follows the conversation only while the reader is at its end.
  let atEnd = true;
  const toEnd = () => {
    atEnd = true;
    const scroll = document.getElementById("scroll");
    if (scroll) scroll.scrollTop = scroll.scrollHeight;
  };
  const watch = () => {
    const scroll = document.getElementById("scroll");
    if (!scroll) return setTimeout(watch, 50);
    let top = 0;
    scroll.addEventListener("scroll", () => {
      const near = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 60;
      if (near || scroll.scrollTop < top) atEnd = near; // only the reader scrolls up
      top = scroll.scrollTop;
    });
    new MutationObserver(() => atEnd && toEnd()).observe(scroll, { childList: true, subtree: true, characterData: true });
  };
  addEventListener("DOMContentLoaded", watch);

  // The source pane: where the reader came from, and the lit span.
  let from = null;
  const reveal = () => {
    const pane = document.getElementById("source");
    if (!pane.contains(document.activeElement)) from = document.activeElement;
    const lit = document.getElementById("lit");
    const scroll = pane.querySelector(".scroll");
    if (lit) lit.scrollIntoView({ block: "center" });
    else if (scroll) scroll.scrollTop = 0;
    pane.querySelector("header button")?.focus({ preventScroll: true });
  };
  const back = () => from?.isConnected && from.focus();
  addEventListener("keydown", (event) => {
    if (event.key === "Escape") document.querySelector("#source:not([hidden]) header button")?.click();
  });

  // On a phone one part is shown at a time.
  const show = (part) => room().setAttribute("data-part", part);

  return { pick, send, again, cancel, toEnd, reveal, back, show };
})();
