// The form: what to decode and how. Reads and writes its fields; starts nothing itself.

import { byId, element } from "./build.js";
import { EXAMPLE_OPTIONS, EXAMPLES } from "./examples.js";
import { faultOfOption, isUsed, MAIN_MODES, noteOf, OPTIONS, titleOf } from "./modes.js";

const RACE = ["speculative", "ar"]; // the same text on two ways
const KEY_STORE = "twotower.key"; // of this tab only

/** Build the fields for the served model, or for what is usual while it is unknown. */
export function buildForm(model) {
  const before = byId("modes").childElementCount > 0 ? readForm() : null;
  const modes = [...model.modes].sort((a, b) => rank(a) - rank(b));
  const isMain = (mode) => MAIN_MODES.includes(mode);
  byId("modes").replaceChildren(...modes.filter(isMain).map(modeChip));
  byId("modes-more").replaceChildren(...modes.filter((mode) => !isMain(mode)).map(modeChip));
  byId("more-modes").hidden = modes.every(isMain);
  for (const id of ["mode-a", "mode-b"]) {
    byId(id).replaceChildren(...modes.map((mode) => new Option(titleOf(mode), mode)));
  }
  const canRace = RACE.every((mode) => modes.includes(mode));
  const [first, second] = canRace ? RACE : [modes[0], modes.at(-1)];
  byId("mode-a").value = first;
  byId("mode-b").value = second;
  byId("options").replaceChildren(...OPTIONS.map((option) => optionField(option, model.defaults)));
  chooseMode(modes[0]);
  if (before) fillForm({ ...before, options: {} });
  refreshForm();
}

function rank(mode) {
  const at = MAIN_MODES.indexOf(mode);
  return at < 0 ? MAIN_MODES.length : at;
}

function modeChip(mode) {
  const input = element("input", { type: "radio", name: "mode", value: mode });
  return element("label", { class: "mode" }, input, element("span", {}, titleOf(mode)));
}

function optionField(option, defaults) {
  const input = element("input", {
    type: "number",
    id: `option-${option.name}`,
    name: option.name,
    inputMode: option.step === 1 ? "numeric" : "decimal",
    min: option.min,
    step: option.step,
    value: defaults[option.fact] ?? option.value,
  });
  if (option.max !== undefined) input.max = option.max;
  return element("label", { class: "option" }, element("span", {}, option.label), input);
}

function chooseMode(mode) {
  const input = document.querySelector(`input[name="mode"][value="${CSS.escape(mode)}"]`);
  if (!input) return;
  input.checked = true;
  if (!MAIN_MODES.includes(mode)) byId("more-modes").open = true;
}

/** Put an example into the form, with the options that let several passes be seen. */
export function fillExample(prompt) {
  byId("prompt").value = prompt;
  for (const [name, value] of Object.entries(EXAMPLE_OPTIONS)) field(name).value = value;
}

/** Example prompts, as buttons that call `use(prompt)`: chips in the form, cards on the stage. */
export function buildExamples(use) {
  const button = (example, ...children) => {
    const made = element("button", { type: "button" }, ...children);
    made.addEventListener("click", () => use(example.prompt));
    return made;
  };
  byId("chips").replaceChildren(...EXAMPLES.map((example) => button(example, example.name)));
  byId("cards").replaceChildren(
    ...EXAMPLES.map((example) =>
      button(
        example,
        element("strong", {}, example.name),
        element("span", {}, example.hint),
        element("code", {}, example.prompt),
      ),
    ),
  );
}

/** {prompt, modes, options}: numbers where the field holds one, else its text. */
export function readForm() {
  const isRace = document.querySelector('input[name="view"]:checked').value === "race";
  const one = document.querySelector('input[name="mode"]:checked')?.value;
  return {
    prompt: byId("prompt").value,
    modes: isRace ? [byId("mode-a").value, byId("mode-b").value] : [one],
    options: Object.fromEntries(OPTIONS.map(({ name }) => [name, Number(field(name).value)])),
  };
}

/** Show {prompt, modes, options} in the fields. Unknown modes are left alone and returned. */
export function fillForm({ prompt, modes, options }) {
  byId("prompt").value = prompt;
  const view = modes.length > 1 ? "race" : "one";
  document.querySelector(`input[name="view"][value="${view}"]`).checked = true;
  if (modes.length > 1) [byId("mode-a").value, byId("mode-b").value] = modes;
  else chooseMode(modes[0]);
  for (const [name, value] of Object.entries(options)) field(name).value = value;
  refreshForm();
  const read = readForm().modes;
  return modes.filter((mode, at) => read[at] !== mode);
}

/** Why the form cannot be sent, as {message, id} of the field at fault, or null. */
export function faultOfForm() {
  if (byId("prompt").value === "") return { message: "Write a prompt first.", id: "prompt" };
  const { modes } = readForm();
  for (const option of OPTIONS) {
    if (!modes.some((mode) => isUsed(option, mode))) continue;
    const message = faultOfOption(option, field(option.name).value);
    if (message) return { message, id: `option-${option.name}` };
  }
  return null;
}

function field(name) {
  return byId(`option-${name}`);
}

/** Show what belongs to the chosen view and mode; an option without effect cannot be edited. */
export function refreshForm() {
  const { modes } = readForm();
  byId("mode-one").hidden = modes.length > 1;
  byId("mode-race").hidden = modes.length === 1;
  byId("mode-note").textContent = modes.length === 1 ? noteOf(modes[0]) : "";
  for (const option of OPTIONS) {
    const matters = modes.some((mode) => isUsed(option, mode));
    field(option.name).disabled = !matters;
    field(option.name).title = matters ? "" : `Has no effect in ${modes.map(titleOf).join(" or ")}`;
  }
}

/** The API key field, kept for the tab's lifetime. */
export function startKeyField() {
  const input = byId("key");
  try {
    input.value = window.sessionStorage.getItem(KEY_STORE) ?? "";
  } catch {
    // A browser that refuses storage: the key lives in the field alone.
  }
  input.addEventListener("input", () => {
    try {
      window.sessionStorage.setItem(KEY_STORE, input.value);
    } catch {
      // As above.
    }
  });
}

export function readKey() {
  return byId("key").value.trim();
}

/** Mark the field at fault and put the cursor there. */
export function pointAt(id) {
  if (id === "key") byId("key-box").open = true;
  byId(id).focus();
}
