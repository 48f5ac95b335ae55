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

/** Of each mode the run of median time; rounds are lists of one run a mode. */
export function medianRuns(rounds) {
  return rounds[0].map((_, lane) => {
    const sorted = rounds.map((runs) => runs[lane]).sort((a, b) => a.last.t - b.last.t);
    return sorted[sorted.length >> 1];
  });
}

/** How a race of two went, over its rounds; each run on its own if one did not finish. */
export function raceSentence(rounds) {
  const runs = medianRuns(rounds);
  if (runs.some((run) => run.state !== "finished")) {
    return runs.map((run) => `${titleOf(run.request.mode)}: ${runSentence(run)}`).join(" ");
  }
  const lanes = runs.map((run, lane) => ({ run, times: rounds.map((one) => one[lane].last.t) }));
  const [fast, slow] = lanes.sort((a, b) => a.run.last.t - b.run.last.t);
  const [name, other] = [fast, slow].map(({ run }) => titleOf(run.request.mode));
  const factor = fast.run.last.t > 0 ? slow.run.last.t / fast.run.last.t : 1;
  const ratio = factor >= 1.05 ? `: ${factor.toFixed(1)} times as fast` : ": about as fast";
  const many = rounds.length > 1 ? `, medians of ${rounds.length} runs each` : ", one run each";
  const texts = fast.run.text === slow.run.text ? "The texts are the same." : "The texts differ.";
  return `${name} took ${spread(fast)}, ${other} ${spread(slow)}${many}${ratio}. ${texts}`;
}

function spread({ run, times }) {
  const middle = milliseconds(run.last.t);
  if (times.length === 1) return middle;
  return `${middle} (${milliseconds(Math.min(...times))} to ${milliseconds(Math.max(...times))})`;
}

/** What can be seen at a moment, for people who see it for the first time. */
export function seenSentence(runs, { lane, at }) {
  if (lane < 0) return "The prompt is prefilled; no token is generated yet.";
  const run = runs[lane];
  const frame = run.frames[at[lane]];
  const group = run.groups[frame.group];
  const count = (status) => frame.cells.filter((cell) => cell.status === status).length;
  if (group.kind === "plain") return plainSentence(frame);
  if (frame.kind === "step") return passSentence(frame, count("masked"));
  const rejected = count("rejected");
  if (run.request.mode === "speculative") {
    return `The context tower verified the draft in one pass and kept ${counted(count("kept"), "token")} of it.`;
  }
  return rejected > 0
    ? `The context tower verified the block and rejected ${counted(rejected, "improbable token")}.`
    : "The context tower committed the block to its cache.";
}

function plainSentence(frame) {
  const newest = frame.cells.slice(frame.shown - frame.filled, frame.shown);
  const copied = newest.filter((cell) => cell.status === "copied").length;
  if (copied === 0) return "The context tower wrote one token, by one pass of its own.";
  return `The context tower verified words copied from the text before and kept ${counted(copied, "token")}.`;
}

function passSentence(frame, masked) {
  const filled = `Pass ${frame.step + 1} filled ${counted(frame.filled, "position")} at once`;
  if (masked === 0) return `${filled}: the block is whole.`;
  const rest = masked === 1 ? "1 position is" : `${masked} positions are`;
  return `${filled}; ${rest} still masked, where the denoiser is not sure enough.`;
}

/** How much slower than it ran a run is shown, in words; empty when about as fast. */
export function paceSentence(runs, shownMs, pace) {
  const ranMs = Math.max(runs[0].last.t, 0.001);
  const factor = runs.length > 1 ? raceFactor(runs, pace) : shownMs / ranMs;
  if (factor < 1.5) return "";
  return `Shown about ${factor.toFixed(factor < 10 ? 1 : 0)} times slower than it ran.`;
}
