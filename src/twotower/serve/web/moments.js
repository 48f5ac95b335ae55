// What the timeline steps through: the frames of one run, or of two runs on one clock.

/**
 * One moment for each picture: {t, lane, at}. `at` has the frame number of every run; `lane` is the
 * run whose frame it is (the first moment, where nothing has happened, belongs to none: -1).
 */
export function momentsOf(runs) {
  const at = runs.map(() => 0);
  const moments = [{ t: 0, lane: -1, at: [...at] }];
  const size = runs.reduce((total, run) => total + run.frames.length - 1, 0);
  while (moments.length <= size) {
    const lane = earliest(runs, at);
    at[lane] += 1;
    moments.push({ t: runs[lane].frames[at[lane]].t, lane, at: [...at] });
  }
  return moments;
}

function earliest(runs, at) {
  const next = runs.map((run, lane) => run.frames[at[lane] + 1]?.t ?? Infinity);
  return next.indexOf(Math.min(...next));
}

// How long a picture of a single run stays in slow motion, in milliseconds.
const PASS_MS = 750;
const COMMIT_MS = 900;
const TOKEN_MS = 45;
const START_MS = 350;
const RACE_MS = 7000; // a race lasts this long in slow motion, or as long as it really took

/** How many times slower than it ran a race of `runs` is shown at `pace`, at least 1. */
export function raceFactor(runs, pace) {
  if (pace === "real") return 1;
  const longest = Math.max(...runs.map((run) => run.last.t));
  return longest > 0 ? Math.max(1, RACE_MS / longest / pace) : 1;
}

/** Milliseconds that moment `k` stays on the screen before the next one. */
export function stay(runs, moments, k, pace) {
  const next = moments[k + 1];
  if (!next) return 0;
  if (runs.length > 1) return (next.t - moments[k].t) * raceFactor(runs, pace);
  if (pace === "real") return next.t - moments[k].t;
  return stayOfFrame(runs[0], runs[0].frames[moments[k].at[0]]) / pace;
}

function stayOfFrame(run, frame) {
  if (frame.kind === "start") return START_MS;
  if (frame.kind === "step") return PASS_MS;
  return run.groups[frame.group].kind === "plain" ? TOKEN_MS : COMMIT_MS;
}

/** The place of a moment in words: for the line beside the slider and for screen readers. */
export function describe(runs, moments, k) {
  const { lane, at, t } = moments[k];
  const place = `${k} of ${moments.length - 1}`;
  if (lane < 0) return `${place}, before the first pass`;
  const run = runs[lane];
  return `${place}, ${describeFrame(run, run.frames[at[lane]])}, ${milliseconds(t)}`;
}

function describeFrame(run, frame) {
  const group = run.groups[frame.group];
  if (group.kind === "plain") return `token ${frame.tokens}`;
  const block = `block ${blockNumber(run, frame.group)}`;
  if (frame.kind === "commit") return `${block} read`;
  const masked = frame.cells.filter((cell) => cell.status === "masked").length;
  return `${block}, pass ${frame.step + 1}, ${masked} left`;
}

/** Number of a block for people: from 1, tokens written one by one not counted. */
export function blockNumber(run, groupIndex) {
  return run.groups.slice(0, groupIndex + 1).filter((group) => group.kind === "block").length;
}

/** A time in few digits: 4.1 ms, 380 ms, 12.5 s. */
export function milliseconds(ms) {
  if (ms >= 9999.5) return `${(ms / 1000).toFixed(1)} s`;
  if (ms >= 999.5) return `${(ms / 1000).toFixed(2)} s`;
  return ms >= 99.95 ? `${ms.toFixed(0)} ms` : `${ms.toFixed(1)} ms`;
}
