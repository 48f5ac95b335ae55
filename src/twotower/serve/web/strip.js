// The picture above the slider: one bar for each moment, as high as the number of positions it filled.

const NAMESPACE = "http://www.w3.org/2000/svg";
const MAX_BARS = 600; // more moments than this share bars
const WIDEST = 26; // of a bar, in pixels
const HEIGHT = 28; // of one lane, in units of the drawing

/** Draw the moments of `runs` into the svg; its width is one unit a moment. */
export function drawStrip(svg, runs, moments) {
  const width = Math.max(1, moments.length - 1);
  svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT * runs.length}`);
  svg.dataset.lanes = runs.length;
  const most = Math.max(1, ...runs.flatMap((run) => run.frames.map((frame) => frame.filled)));
  const every = Math.ceil(moments.length / MAX_BARS);
  const unit = Math.max(1, svg.clientWidth) / width; // in pixels
  const barWidth = Math.min(0.7, WIDEST / unit) * every;
  const bars = [];
  moments.forEach(({ lane, at }, k) => {
    if (lane < 0 || k % every !== 0) return;
    bars.push(bar(runs[lane].frames[at[lane]], lane, k, most, barWidth));
  });
  svg.replaceChildren(...bars);
}

function bar(frame, lane, k, most, width) {
  const isStep = frame.kind === "step" || frame.filled > 0;
  const height = isStep ? Math.max(3, (frame.filled / most) * (HEIGHT - 4)) : 2;
  const made = document.createElementNS(NAMESPACE, "rect");
  for (const [name, value] of Object.entries({
    x: k - width / 2,
    y: (lane + 1) * HEIGHT - height,
    width,
    height,
    class: `bar ${isStep ? "pass" : "commit"} lane-${lane}`,
  })) {
    made.setAttribute(name, value);
  }
  made.dataset.k = k;
  return made;
}

/** Mark the bars up to moment `k` as passed. */
export function markStrip(svg, k) {
  for (const made of svg.children) made.classList.toggle("past", Number(made.dataset.k) <= k);
}
