// One lane of the stage: a run's figures, its text so far and its blocks, at one frame.

import { element } from "./build.js";
import { BlockList } from "./cells.js";
import { titleOf } from "./modes.js";
import { milliseconds } from "./moments.js";
import { figures } from "./run.js";

const DASH = "\u2013";

/** [label, value as text, explanation] of each figure; drafts only where the mode has them. */
function rows(values) {
  const number = (value, digits = 0) => (value === null ? DASH : value.toFixed(digits));
  const shown = [
    ["tokens/s", number(values.tokensPerSecond), "tokens that are text, by the time"],
    ["time", milliseconds(values.seconds * 1000), "since the request, prefill included"],
    ["tokens", number(values.tokens), "tokens that are text"],
    ["NFE", number(values.nfe), "passes of the denoiser tower"],
    ["tokens/NFE", number(values.tokensPerNfe, 2), "tokens that are text, by denoiser passes"],
    ["context passes", number(values.contextForwards), "passes of the context tower"],
  ];
  if (values.accepted === null) return shown;
  return [
    ...shown,
    ["drafts kept", number(values.accepted), "draft tokens that the context tower accepted"],
    ["drafts rejected", number(values.rejected), "draft tokens that it read and did not choose"],
  ];
}

/** Builds the lane's elements once; `show(at)` brings them to a frame. */
export class Lane {
  /** `place` tells lanes apart for screen readers, as two may have the same mode. */
  constructor(run, place) {
    this.run = run;
    this.title = titleOf(run.request.mode);
    const name = `${this.title}${place}`;
    this.state = element("span", { class: "lane-state" });
    this.figures = element("dl", { class: "figures" });
    this.written = element("span", { class: "written" });
    this.list = element("ol", { class: "blocks", tabIndex: 0, "aria-label": `Blocks, ${name}` });
    this.blocks = new BlockList(run, this.list);
    this.root = this.#build(name);
    this.show(0);
  }

  #build(name) {
    const prompt = element("span", { class: "given" }, this.run.request.prompt);
    const named = { tabIndex: 0, role: "group", "aria-label": `Text, ${name}` };
    this.text = element("p", { class: "text", ...named }, prompt, this.written);
    return element(
      "article",
      { class: "lane", "aria-label": name },
      element("header", { class: "lane-head" }, element("h2", {}, this.title), this.state),
      this.figures,
      element("div", { class: "lane-body" }, this.text, this.list),
    );
  }

  /** Show frame number `at` of the run. */
  show(at) {
    const frame = this.run.frames[at];
    this.written.textContent = this.run.text.slice(0, frame.textLength);
    this.text.scrollTop = this.text.scrollHeight;
    this.#showFigures(rows(figures(frame)));
    this.blocks.show(at);
    const isEnd = at === this.run.frames.length - 1 && this.run.isOver;
    this.root.classList.toggle("ended", isEnd);
    this.state.textContent = isEnd ? endOf(this.run) : "";
  }

  say(text) {
    this.state.textContent = text;
  }

  #showFigures(shown) {
    if (this.figures.childElementCount !== shown.length) {
      this.figures.replaceChildren(
        ...shown.map(([label, , help]) =>
          element("div", { title: help }, element("dt", {}, label), element("dd", {})),
        ),
      );
    }
    shown.forEach(([, value], at) => {
      this.figures.children[at].lastChild.textContent = value;
    });
  }
}

/** How a run ended, in two or three words. */
export function endOf(run) {
  if (run.state === "stopped") return "stopped";
  if (run.state === "failed") return "broken off";
  if (run.finishReason === "length") return "all tokens used";
  if (run.finishReason === "content_filter") return "held back by a filter";
  return "text complete";
}
