// Sentences about runs: what the status line and screen readers are told.

import { titleOf } from "./modes.js";
import { milliseconds, raceFactor } from "./moments.js";

function counted(count, one, many = `${one}s`) {
  return `${count} ${count === 1 ? one : many}`;
}

/** How a single run went. */
export function runSentence(run) {
  const { tokens, nfe, contextForwards, t } = run.last;
  const passes = [
    ...(nfe > 0 ? [counted(nfe, "denoiser pass", "denoiser passes")] : []),
    ...(contextForwards > 0 ? [counted(contextForwards, "context pass", "context passes")] : []),
  ].join(" and ");
  const how = passes ? `, with ${passes}` : "";
  const work = `${counted(tokens, "token")} in ${milliseconds(t)}${how}`;
  if (run.state === "stopped") return `Stopped after ${work}.`;
  if (run.state === "failed") return `Broken off after ${work}.`;
  return `Done: ${work}.`;
}

/** How a race of two went; each on its own if one did not finish. */
export function raceSentence(runs) {
  if (runs.some((run) => run.state !== "finished")) {
    return runs.map((run) => `${titleOf(run.request.mode)}: ${runSentence(run)}`).join(" ");
  }
  const [fast, slow] = [...runs].sort((a, b) => a.last.t - b.last.t);
  const [name, other] = [fast, slow].map((run) => titleOf(run.request.mode));
  const times = `${name} took ${milliseconds(fast.last.t)}, ${other} ${milliseconds(slow.last.t)}`;
  const ratio = fast.last.t > 0 ? `: ${(slow.last.t / fast.last.t).toFixed(1)} times as fast` : "";
  const texts = fast.text === slow.text ? "The texts are the same." : "The texts differ.";
  return `${times}${ratio}. ${texts}`;
}

/** How much slower than it ran a run is shown, in words; empty when about as fast. */
export function paceSentence(runs, shownMs, pace) {
  const ranMs = Math.max(runs[0].last.t, 0.001);
  const factor = runs.length > 1 ? raceFactor(runs, pace) : shownMs / ranMs;
  if (factor < 1.5) return "";
  return `Shown about ${factor.toFixed(factor < 10 ? 1 : 0)} times slower than it ran.`;
}
