// The stage: lanes, timeline, playback and legend of the runs that are shown.

import { byId, element } from "./build.js";
import { BANDS, ORDERS } from "./cells.js";
import { Lane } from "./lane.js";
import { describe, momentsOf, stay } from "./moments.js";
import { Player } from "./player.js";
import { drawStrip, markStrip } from "./strip.js";
import { medianRuns, paceSentence, raceSentence, runSentence } from "./words.js";
import { seenSentence } from "./words.js";

const HOLD_MS = 700; // a race that is decoded sooner than this is shown from its start at once

/** Shows runs and lets people move through them. */
export class Stage {
  constructor() {
    this.runs = [];
    this.lanes = [];
    this.moments = [];
    this.isStale = false; // events have come since the moments were counted
    this.isHeld = false; // people moved the slider of a live run
    this.openedAt = 0;
    this.wantsStill = window.matchMedia("(prefers-reduced-motion: reduce)");
    this.player = new Player(
      {
        count: () => this.#fresh().length,
        stay: (k) => stay(this.runs, this.#fresh(), k, this.pace),
        isOver: () => this.isOver,
      },
      (k) => this.#draw(k),
      () => this.#showPlaying(),
    );
    this.#wire();
    this.#buildLegend();
    buildSketch();
  }

  get pace() {
    const value = byId("pace").value;
    return value === "real" ? value : Number(value);
  }

  get isOver() {
    return this.runs.every((run) => run.isOver);
  }

  /** Put new runs on the stage, before their first event. */
  open(runs) {
    this.player.pause();
    this.runs = runs;
    this.isHeld = false;
    this.lanes = runs.map((run, at) => new Lane(run, runs.length > 1 ? `, lane ${at + 1}` : ""));
    byId("lanes").replaceChildren(...this.lanes.map((lane) => lane.root));
    byId("lanes").dataset.count = runs.length;
    // An example that was chosen by key is about to go: whoever chose it must not be lost.
    const held = byId("empty").contains(document.activeElement);
    byId("empty").hidden = true;
    byId("result").hidden = false;
    if (held) byId("stage").focus({ preventScroll: true });
    byId("notice").hidden = true;
    byId("shared").hidden = true;
    this.tell("");
    this.openedAt = performance.now();
    this.isStale = true;
    this.player.follow();
    if (runs.length === 1 && !this.wantsStill.matches) this.player.play();
  }

  /** Events have come: draw at the next occasion. */
  arrived() {
    if (this.isStale) return;
    this.isStale = true;
    requestAnimationFrame(() => this.#catchUp());
  }

  /**
   * All runs are over: say how it went, and start a race's playback. Of several rounds of a race
   * the runs of median time are shown.
   */
  close(rounds) {
    if (rounds.length > 1) this.open(medianRuns(rounds));
    this.isStale = true;
    const sentence = this.runs.length > 1 ? raceSentence(rounds) : runSentence(this.runs[0]);
    this.#showNotice();
    this.say(`${sentence} ${this.#paceInWords()}`);
    if (this.runs.length > 1 && !this.wantsStill.matches && this.#fresh().length > 1) {
      this.player.seek(0);
      this.player.play();
    } else if (!this.player.isPlaying) {
      this.player.follow();
    }
    this.#drawTimeline();
  }

  say(text) {
    byId("status").textContent = text.trim();
  }

  /** What a button did; how the run went stays beside it. */
  tell(text) {
    byId("told").textContent = text;
  }

  #fresh() {
    if (this.isStale) {
      this.moments = momentsOf(this.runs);
      this.isStale = false;
    }
    return this.moments;
  }

  /** Whether the model can be expected to answer such a prompt at all. */
  #showNotice() {
    const { notice } = this.runs[0];
    byId("notice").hidden = notice === null;
    byId("notice").textContent = notice === null ? "" : `The prompt is ${notice}.`;
  }

  #catchUp() {
    this.#fresh();
    this.#showNotice();
    this.#drawTimeline();
    const isRecording = this.runs.length > 1 && !this.isOver;
    const isLate = performance.now() - this.openedAt > HOLD_MS;
    if (isRecording ? isLate : this.wantsStill.matches && !this.isHeld) this.player.follow();
  }

  #draw(k) {
    const moments = this.#fresh();
    const { at } = moments[k];
    this.lanes.forEach((lane, number) => lane.show(at[number]));
    byId("scrub").value = k;
    const words = describe(this.runs, moments, k);
    byId("moment").textContent = words;
    byId("seen").textContent = seenSentence(this.runs, moments[k]);
    byId("scrub").setAttribute("aria-valuetext", words);
    markStrip(byId("strip"), k);
  }

  #drawTimeline() {
    const moments = this.#fresh();
    byId("scrub").max = moments.length - 1;
    drawStrip(byId("strip"), this.runs, moments);
    this.#draw(Math.min(this.player.at, moments.length - 1));
  }

  #showPlaying() {
    byId("play").dataset.playing = this.player.isPlaying;
    byId("play").setAttribute("aria-label", this.player.isPlaying ? "Pause" : "Play");
  }

  #paceInWords() {
    if (this.wantsStill.matches) return "";
    const moments = this.#fresh();
    const stays = moments.map((_, k) => stay(this.runs, moments, k, this.pace));
    return paceSentence(this.runs, stays.reduce((total, ms) => total + ms, 0), this.pace);
  }

  #wire() {
    const seek = (k) => {
      this.isHeld = !this.isOver; // a live run goes on, but the picture stays where people put it
      this.player.seek(k);
    };
    byId("scrub").addEventListener("input", (event) => seek(Number(event.target.value)));
    byId("back").addEventListener("click", () => seek(this.player.at - 1));
    byId("forward").addEventListener("click", () => seek(this.player.at + 1));
    byId("play").addEventListener("click", () => {
      if (this.player.isPlaying) this.player.pause();
      else this.player.play();
    });
    byId("shade").addEventListener("change", (event) => {
      byId("result").dataset.shade = event.target.value;
      this.#buildLegend();
    });
  }

  #buildLegend() {
    const isOrder = byId("shade").querySelector("input:checked").value === "order";
    byId("result").dataset.shade = isOrder ? "order" : "confidence";
    const filled = isOrder
      ? ORDERS.map((name, at) => sample({ status: "filled", order: at + 1 }, String(at + 1), name))
      : BANDS.map(({ name }, at) => sample({ status: "filled", band: at + 1 }, "", name));
    byId("legend-items").replaceChildren(
      sample({ status: "masked" }, "", "blank"),
      ...filled,
      sample({ status: "own" }, "a", "the context tower's own"),
      sample({ status: "copied" }, "a", "copied from the text before"),
      sample({ status: "rejected", band: 2, order: 1 }, "a", "rejected"),
    );
  }
}

/** An entry of the legend. */
function sample(data, text, name) {
  const inside = element("span", { class: "cell-text" }, text);
  const cell = element("span", { class: "cell sample", "aria-hidden": "true" }, inside);
  Object.assign(cell.dataset, data);
  return element("li", {}, cell, name);
}

/** The idea as a drawing for the empty stage: blanks that fill over three passes. No real run. */
function buildSketch() {
  const passes = [
    ["before", "........"],
    ["pass 1", "55.4..5."],
    ["pass 2", "5554.554"],
    ["pass 3", "55545554"],
  ];
  const cell = (sign) => {
    const made = element("span", { class: "cell" });
    made.dataset.status = sign === "." ? "masked" : "filled";
    made.dataset.band = sign === "." ? "" : sign;
    return made;
  };
  byId("sketch").replaceChildren(
    ...passes.flatMap(([name, cells]) => [element("p", {}, name), ...[...cells].map(cell)]),
  );
}
