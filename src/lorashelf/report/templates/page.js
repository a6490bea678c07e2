// The page without it shows everything and can undo, redo and add; this streams answers, takes dropped folders, and
// replaces the page's content instead of loading it anew. A key stays in the tab's session storage.
"use strict";
{
  const find = (id) => document.getElementById(id);
  const stored = () => sessionStorage.getItem("lorashelf-key");
  const headers = (more) => ({ ...(stored() ? { authorization: `Bearer ${stored()}` } : {}), ...more });
  let neighbours = {};
  let running = null;
  let chosen = [];

  const explained = async (response) => {
    const text = await response.text();
    try { return JSON.parse(text).error.message; } catch { return `the server answered ${response.status}`; }
  };

  // the whole page ---------------------------------------------------------------------------------------------------
  const replaced = (html) => {
    const made = new DOMParser().parseFromString(html, "text/html");
    document.title = made.title;
    document.body.replaceWith(document.adoptNode(made.body));
    begin();
  };

  const changed = async (form) => {
    const response = await fetch(form.action, { method: "POST", body: new FormData(form), headers: headers() });
    await swapped(response);
  };

  const swapped = async (response) => {
    if (!(response.headers.get("content-type") || "").startsWith("text/html")) return told(await explained(response));
    replaced(await response.text());
    find("notice").focus();
  };

  const told = (message) => {
    const notice = find("notice"), line = document.createElement("p");
    notice.setAttribute("role", "alert");
    line.className = "fault";
    line.textContent = message;
    notice.replaceChildren(line);
    notice.focus();
  };

  const opened = async (key) => {
    const response = await fetch("/", { headers: { authorization: `Bearer ${key}` } });
    if (!response.ok) return explained(response);
    sessionStorage.setItem("lorashelf-key", key);
    replaced(await response.text());
    return "";
  };

  // answers ----------------------------------------------------------------------------------------------------------
  const streamed = async (model, request, shown, signal) => {
    shown.textContent = "";
    shown.classList.add("running");
    try {
      const response = await fetch("/v1/chat/completions", {
        method: "POST", signal, headers: headers({ "content-type": "application/json" }),
        body: JSON.stringify({ ...request, model, stream: true }),
      });
      if (!response.ok) { shown.textContent = await explained(response); return; }
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
      for (let rest = "", part = await reader.read(); !part.done; part = await reader.read()) {
        const lines = (rest + part.value).split("\n\n");
        rest = lines.pop();
        for (const line of lines.map((each) => each.slice(6)).filter((each) => each !== "[DONE]")) {
          const event = JSON.parse(line);
          if (event.error) shown.textContent += ` [${event.error.message}]`;
          else shown.textContent += event.choices[0]?.delta.content ?? "";
        }
      }
    } catch (error) {
      shown.textContent += error.name === "AbortError" ? " [stopped]" : ` [${error.message}]`;
    } finally {
      shown.classList.remove("running");
    }
  };

  const option = () => find("try-task").selectedOptions[0];
  const ofSlot = (slot) => [...find("try-task").options].find((each) => each.dataset.slot === slot);

  const described = () => {
    const { slot, prompt } = option().dataset, near = ofSlot(neighbours[slot]);
    find("try-prompt").textContent = prompt ? `Instruction: ${prompt}` : "No instruction is stored with this task.";
    find("answer-own").textContent = `Slot ${slot}, its own`;
    find("answer-near").textContent = near ? `Slot ${near.dataset.slot}, the nearest: ${near.value}` : "No other slot";
  };

  const asked = async () => {
    running?.abort();
    const stop = running = new AbortController();
    const { slot, prompt, tokens } = option().dataset, near = ofSlot(neighbours[slot]);
    const turns = [{ role: "user", content: find("try-text").value }];
    // the same instruction for all three, where one is stored; else the neighbour would be asked its own
    const request = { messages: [{ role: "system", content: prompt }, ...turns], max_tokens: Number(tokens) };
    find("try-stop").disabled = false;
    find("try-status").textContent = "The model answers …";
    find("near").textContent = "";
    const models = [[option().value, "own"], ...(near ? [[near.value, "near"]] : []), ["base", "base"]];
    await Promise.all(models.map(([model, id]) => streamed(model, request, find(id), stop.signal)));
    if (running !== stop) return;
    find("try-stop").disabled = true;
    find("try-status").textContent = stop.signal.aborted ? "Stopped." : "Done.";
  };

  // adding -----------------------------------------------------------------------------------------------------------
  const choose = (files) => {
    chosen = files;
    const [first] = files;
    find("plan").replaceChildren();
    find("add-commit").disabled = true;
    if (!first) { find("add-chosen").textContent = "Nothing chosen."; return; }
    const top = first.path.split("/")[0], whole = files.reduce((sum, each) => sum + each.file.size, 0);
    find("add-chosen").textContent = `${top}: ${files.length} ${files.length === 1 ? "file" : "files"}, ${(whole / 1e6).toFixed(2)} MB`;
    find("add-task").value = top.replace(/\.zip$/i, "");
  };

  const listed = (input) => [...input.files].map((file) => ({ path: file.webkitRelativePath || file.name, file }));

  const walked = async (entry) => {
    if (entry.isFile) {
      const file = await new Promise((done, failed) => entry.file(done, failed));
      return [{ path: entry.fullPath.slice(1), file }];
    }
    const reader = entry.createReader(), found = [];
    for (;;) {
      const some = await new Promise((done, failed) => reader.readEntries(done, failed));
      if (!some.length) return found;
      for (const each of some) found.push(...await walked(each));
    }
  };

  const body = (form) => {
    const made = new FormData(form);
    made.delete("files");
    for (const { path, file } of chosen) made.append("files", file, path);
    return made;
  };

  const planned = async (form) => {
    const response = await fetch("/page/plan", { method: "POST", body: body(form), headers: headers() });
    const html = (response.headers.get("content-type") || "").startsWith("text/html");
    if (!html) return told(await explained(response));
    find("plan").innerHTML = await response.text();
    const plan = find("plan").querySelector("[data-head]");
    if (plan) form.elements.head.value = plan.dataset.head;
    find("add-commit").disabled = !plan;
  };

  const added = async (form) => {
    await swapped(await fetch("/page/add", { method: "POST", body: body(form), headers: headers() }));
  };

  // everything again after every change of the page ---------------------------------------------------------------------
  const busy = (form, work) => async (event) => {
    event.preventDefault();
    const buttons = [...form.querySelectorAll("button:enabled")].filter((each) => each.id !== "try-stop");
    for (const each of buttons) each.setAttribute("aria-busy", "true");
    try { await work(event); } catch (error) { told(error.message); }
    for (const each of buttons) each.removeAttribute("aria-busy");
  };

  const compared = async () => {
    const response = await fetch("/page/similarity", { headers: headers() });
    const place = find("compared");
    if (!response.ok) { place.textContent = await explained(response); return; }
    place.innerHTML = await response.text();
    neighbours = Object.fromEntries([...place.querySelectorAll("[data-nearest]")].map((row) => [row.dataset.slot, row.dataset.nearest]));
    if (find("try")) described();
  };

  const begin = () => {
    const key = find("key"), trial = find("try"), add = find("add"), drop = find("drop");
    if (key) {
      key.addEventListener("submit", busy(key, async () => { find("key-fault").textContent = await opened(find("key-field").value.trim()); }));
      if (stored()) opened(stored());
      return;
    }
    for (const form of document.querySelectorAll("form.change")) form.addEventListener("submit", busy(form, () => changed(form)));
    if (trial) {
      trial.addEventListener("submit", busy(trial, asked));
      find("try-stop").addEventListener("click", () => running?.abort());
      find("try-task").addEventListener("change", described);
      described();
    }
    chosen = [];
    find("add-commit").disabled = true;
    add.addEventListener("submit", busy(add, (event) => (event.submitter?.id === "add-commit" ? added(add) : planned(add))));
    for (const input of [find("add-folder"), find("add-zip")]) {
      input.addEventListener("change", () => choose(listed(input)));
    }
    for (const kind of ["dragenter", "dragover"]) drop.addEventListener(kind, (event) => { event.preventDefault(); drop.classList.add("over"); });
    drop.addEventListener("dragleave", () => drop.classList.remove("over"));
    drop.addEventListener("drop", async (event) => {
      event.preventDefault();
      drop.classList.remove("over");
      const dropped = [...event.dataTransfer.items].filter((item) => item.kind === "file").map((item) => {
        const entry = item.webkitGetAsEntry(), file = item.getAsFile();
        return entry ? walked(entry) : [{ path: file.name, file }];
      });
      choose((await Promise.all(dropped)).flat());
      add.requestSubmit(find("add-plan"));
    });
    compared();
  };

  begin();
}
