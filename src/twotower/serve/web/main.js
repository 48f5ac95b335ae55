// The page: what happens when. Everything else lives in the modules that it names.

import { Fault, fetchModel, streamRun } from "./api.js";
import { byId } from "./build.js";
import { saveFile, toExport } from "./export.js";
import { buildExamples, buildForm, faultOfForm, fillExample } from "./form.js";
import { fillForm, refreshForm } from "./form.js";
import { pointAt, readForm, readKey, startKeyField } from "./form.js";
import { fromFragment, toAddress, toFragment } from "./link.js";
import { MAIN_MODES, optionsOf, titleOf } from "./modes.js";
import { Run } from "./run.js";
import { Stage } from "./stage.js";
import { startTheme } from "./theme.js";

const ROUNDS = 5; // of a race, whose single times say little
const MAX_RACE_MS = 8000; // no further round begins later than this
const UNKNOWN = { id: null, modes: MAIN_MODES, defaults: {}, about: "" };

let model = UNKNOWN;
let running = null; // AbortController of the runs that the server works on
let waiting = 0; // timer of the seconds until a busy server can be asked again
let shownForm = null; // the form as it was when the shown runs began
const stage = new Stage();

/** Ask for the model until it is known. Faults are shown; the form works meanwhile. */
async function meetModel() {
  if (model.id !== null) return true;
  try {
    model = await fetchModel(readKey());
  } catch (error) {
    byId("model").textContent = error.kind === "key" ? "API key needed" : "No server";
    byId("model").dataset.state = "bad";
    showFault(error);
    return false;
  }
  byId("model").textContent = model.id;
  byId("about").textContent = model.about;
  byId("about").hidden = model.about === "";
  if (model.about === "") byId("known").textContent = "Examples, made for the shipped model";
  byId("model").dataset.state = "good";
  buildForm(model);
  return true;
}

/** Decode what the form says. */
async function run() {
  if (running) return;
  hideFault();
  const fault = faultOfForm();
  if (fault) {
    showFault(new Fault("input", fault.message));
    pointAt(fault.id);
    return;
  }
  setRunning(new AbortController());
  try {
    if (await meetModel()) await decode(readForm());
  } finally {
    setRunning(null);
  }
}

/** Decode what the form says; a race again and again, the modes taking turns. */
async function decode(form) {
  shownForm = form;
  const newRuns = () => form.modes.map((mode) => new Run(requestOf(form, mode)));
  const runs = newRuns();
  history.replaceState(null, "", `#${fragmentOf(form)}`);
  stage.open(runs);
  byId("chips").hidden = false;
  // On a narrow screen the stage lies below the form.
  if (window.matchMedia("(max-width: 62rem)").matches) byId("stage").scrollIntoView();
  const begin = performance.now();
  const rounds = [runs];
  let isWhole = await decodeRound(runs, "");
  while (isWhole && runs.length > 1 && rounds.length < ROUNDS) {
    if (performance.now() - begin > MAX_RACE_MS) break;
    const again = newRuns();
    isWhole = await decodeRound(again, `, round ${rounds.length + 1} of ${ROUNDS}`);
    if (isWhole) rounds.push(again);
  }
  stage.close(rounds);
}

/** Decode runs one after the other; whether all came to their end. */
async function decodeRound(runs, round) {
  for (const [at, one] of runs.entries()) {
    const place = runs.length > 1 ? ` (${at + 1} of ${runs.length}${round})` : "";
    stage.say(`Decoding: ${titleOf(one.request.mode)}${place}.`);
    if (one.isOver || !(await decodeOne(one))) {
      runs.filter((other) => !other.isOver).forEach((other) => other.end("stopped"));
    }
  }
  return runs.every((one) => one.state === "finished");
}

function requestOf(form, mode) {
  return { model: model.id, prompt: form.prompt, mode, ...optionsOf(mode, form.options) };
}

/** Decode one run; whether the next one may follow. */
async function decodeOne(one) {
  try {
    await streamRun(one.request, readKey(), running.signal, (event) => {
      one.take(event);
      stage.arrived();
    });
    one.end("finished");
    return true;
  } catch (error) {
    if (error.name === "AbortError") {
      one.end("stopped");
    } else {
      one.end("failed", error.message);
      showFault(error);
    }
    return false;
  }
}

function setRunning(controller) {
  running = controller;
  byId("run").setAttribute("aria-disabled", String(controller !== null));
  byId("stop").setAttribute("aria-disabled", String(controller === null));
}

function stop() {
  running?.abort();
}

/** A fault as a sentence, with what can be done: wait, try again, give a key. */
function showFault(error) {
  if (!(error instanceof Fault)) throw error;
  byId("fault").hidden = false;
  byId("fault").dataset.kind = error.kind;
  byId("fault-text").textContent = error.message;
  byId("again").hidden = error.kind === "input";
  byId("again").textContent = "Try again";
  if (error.kind === "key") pointAt("key");
  if (error.retryAfter !== null) countDown(error.retryAfter);
}

/** Seconds on the button, not in the alert: a screen reader hears the wait once. */
function countDown(seconds) {
  byId("fault-text").textContent += ` There should be room in ${seconds} s.`;
  const until = performance.now() + seconds * 1000;
  const tick = () => {
    const left = Math.ceil((until - performance.now()) / 1000);
    byId("again").textContent = left > 0 ? `Try again in ${left} s` : "Try again";
    byId("again").setAttribute("aria-disabled", String(left > 0));
    if (left <= 0) clearInterval(waiting);
  };
  tick();
  waiting = setInterval(tick, 250);
}

function hideFault() {
  clearInterval(waiting);
  byId("fault").hidden = true;
  byId("again").removeAttribute("aria-disabled");
}

function fragmentOf(form) {
  const used = Object.assign({}, ...form.modes.map((mode) => optionsOf(mode, form.options)));
  return toFragment({ ...form, options: used, model: model.id });
}

/** Put the link on the clipboard; where the browser refuses, show it to be copied by hand. */
async function share() {
  if (!shownForm) return;
  const address = toAddress(fragmentOf(shownForm));
  try {
    await navigator.clipboard.writeText(address);
    stage.tell("The link is on the clipboard.");
  } catch {
    byId("shared").hidden = false;
    byId("address").value = address;
    byId("address").select();
  }
}

function exportRuns() {
  if (stage.runs.length === 0) return;
  saveFile("twotower-run.json", `${JSON.stringify(toExport(stage.runs, model), null, 1)}\n`);
  stage.tell("Saved as twotower-run.json.");
}

/** Fill the form from the address and run it; nothing happens where the address tells of no run. */
async function openLink() {
  let linked;
  try {
    linked = fromFragment(window.location.hash);
  } catch (error) {
    showFault(new Fault("input", error.message));
    return;
  }
  if (!linked) return;
  const unknown = fillForm(linked);
  if (unknown.length > 0) {
    const names = unknown.join(", ");
    showFault(new Fault("input", `This server has no mode ${names}; choose another one and run.`));
    return;
  }
  const wasFor = linked.model;
  await run();
  if (wasFor && model.id && wasFor !== model.id) {
    stage.tell(`The link was made with another model, ${wasFor}.`);
  }
}

function wire() {
  byId("form").addEventListener("submit", (event) => {
    event.preventDefault();
    run();
  });
  byId("form").addEventListener("change", refreshForm);
  byId("stop").addEventListener("click", stop);
  byId("again").addEventListener("click", () => {
    if (byId("again").getAttribute("aria-disabled") !== "true") run();
  });
  byId("share").addEventListener("click", share);
  byId("export").addEventListener("click", exportRuns);
  window.addEventListener("hashchange", openLink);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) run();
    else if (event.key === "Escape") stop();
  });
}

async function start() {
  startTheme(byId("theme"));
  startKeyField();
  buildForm(UNKNOWN);
  buildExamples((prompt) => {
    if (running) return;
    fillExample(prompt);
    run();
  });
  wire();
  await meetModel();
  await openLink();
}

start();
