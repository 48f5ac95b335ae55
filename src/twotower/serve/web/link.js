// A run as a link: options and prompt in the address's fragment, which browsers never send to a
// server. The seed is always part of it, so that opening the link decodes the same text.

const VERSION = "1";
const NUMBERS = ["max_tokens", "temperature", "confidence_threshold", "steps_per_block", "seed"];

/** The fragment (without #) of {prompt, modes, options, model}; two modes make a race. */
export function toFragment({ prompt, modes, options, model }) {
  const fields = new URLSearchParams({ v: VERSION });
  for (const mode of modes) fields.append("mode", mode);
  for (const name of NUMBERS) {
    if (options[name] !== undefined) fields.set(name, String(options[name]));
  }
  if (model) fields.set("model", model);
  fields.set("prompt", prompt);
  return fields.toString();
}

/**
 * The run that a fragment tells of, or null when it tells of none (empty, or another use of #).
 * Throws Error in a sentence for a link that is damaged or from a later version of the page.
 */
export function fromFragment(fragment) {
  const fields = new URLSearchParams(fragment.replace(/^#/, ""));
  if (!fields.has("v")) return null;
  if (fields.get("v") !== VERSION) {
    throw new Error("This link was made by another version of the page and cannot be opened here.");
  }
  const modes = fields.getAll("mode");
  const prompt = fields.get("prompt") ?? "";
  if (modes.length < 1 || modes.length > 2 || prompt === "") {
    throw new Error("This link is incomplete: it needs a mode and a prompt.");
  }
  return { prompt, modes, options: readNumbers(fields), model: fields.get("model") };
}

function readNumbers(fields) {
  const options = {};
  for (const name of NUMBERS) {
    if (!fields.has(name)) continue;
    const value = Number(fields.get(name));
    if (!Number.isFinite(value)) {
      throw new Error(`This link is damaged: ${name} is not a number.`);
    }
    options[name] = value;
  }
  return options;
}

/** The address of the page with a fragment. */
export function toAddress(fragment) {
  const page = new URL(window.location.href);
  page.hash = fragment;
  return page.href;
}
