// What the page says about each mode, and which options matter in it.

const MODES = {
  diffusion: {
    title: "Diffusion",
    note:
      "A block of blanks is filled in parallel: what is surer than the threshold stays, " +
      "the rest is tried again in the next pass.",
  },
  speculative: {
    title: "Speculative",
    note:
      "The denoiser drafts a block in one pass; the context tower keeps what it would have " +
      "written itself. The text is that of AR.",
  },
  ar: { title: "AR", note: "The context tower alone, one token a pass: the yardstick." },
  posterior: {
    title: "Posterior",
    note: "Positions are filled at random times on a fixed schedule, and never changed again.",
  },
  "predict-and-noise": {
    title: "Predict and noise",
    note: "Every pass predicts all positions, then masks the least sure again, fewer each time.",
  },
  "mock-ar": { title: "Mock AR", note: "The denoiser, one token a pass: for comparison only." },
};

/** The modes that are offered first; the others stand behind them. */
export const MAIN_MODES = ["diffusion", "speculative", "ar"];

/** Fields of the form: `name` in the request, `fact` among the server's defaults. */
export const OPTIONS = [
  { name: "max_tokens", fact: "max_new_tokens", label: "Maximum tokens", value: 128, min: 1, step: 1 },
  {
    name: "confidence_threshold",
    fact: "confidence_threshold",
    label: "Threshold",
    value: 0.8,
    min: 0,
    max: 1,
    step: 0.05,
    modes: ["diffusion"],
  },
  {
    name: "steps_per_block",
    fact: "steps_per_block",
    label: "Passes per block",
    value: 16,
    min: 1,
    step: 1,
    modes: ["diffusion", "posterior", "predict-and-noise"],
  },
  { name: "temperature", fact: "temperature", label: "Temperature", value: 0, min: 0, step: 0.1 },
  { name: "seed", fact: "seed", label: "Seed", value: 0, min: 0, step: 1 },
];

/** Whether an option changes anything in a mode; the server refuses those that do not. */
export function isUsed(option, mode) {
  return !option.modes || option.modes.includes(mode);
}

export function titleOf(mode) {
  return MODES[mode]?.title ?? mode;
}

export function noteOf(mode) {
  return MODES[mode]?.note ?? "";
}

/** The part of `options` that `mode` uses: what is sent to the server. */
export function optionsOf(mode, options) {
  const used = OPTIONS.filter((option) => isUsed(option, mode) && option.name in options);
  return Object.fromEntries(used.map(({ name }) => [name, options[name]]));
}

/** Why a value is unusable, in a sentence, or null. `text` is what stands in the field. */
export function faultOfOption(option, text) {
  const value = Number(text);
  const isWhole = option.step === 1;
  const kind = isWhole ? "a whole number" : "a number";
  const range =
    option.max === undefined ? `of at least ${option.min}` : `from ${option.min} to ${option.max}`;
  const isGood =
    text.trim() !== "" &&
    Number.isFinite(value) &&
    (!isWhole || Number.isSafeInteger(value)) &&
    value >= option.min &&
    value <= (option.max ?? Infinity);
  return isGood ? null : `${option.label} must be ${kind} ${range}.`;
}
