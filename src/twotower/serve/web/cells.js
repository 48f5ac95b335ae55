// Blocks as cells. One cell is one token: blank while masked, then text with how sure the denoiser
// was (colour and a bar below) and in which pass it was filled (a number).

import { element } from "./build.js";
import { blockNumber } from "./moments.js";
import { groupFrame } from "./run.js";

/** Ends of the confidence bands and their names in the legend; the last one has no end. */
export const BANDS = [
  { below: 0.5, name: "under 50 %" },
  { below: 0.8, name: "50 to 80 %" },
  { below: 0.95, name: "80 to 95 %" },
  { below: 0.99, name: "95 to 99 %" },
  { below: Infinity, name: "over 99 %" },
];
/** Passes with a shade of their own; later ones share the last. */
export const ORDERS = ["pass 1", "pass 2", "pass 3", "pass 4", "pass 5 or later"];

/** Number of a confidence's band, from 1. */
export function bandOf(confidence) {
  return BANDS.findIndex((band) => confidence < band.below) + 1;
}

export function orderShade(order) {
  return Math.min(order, ORDERS.length);
}

/** The list of a run's blocks; `show(at)` brings it to a frame and changes only what differs. */
export class BlockList {
  constructor(run, list) {
    this.run = run;
    this.list = list;
    this.blocks = []; // {item, head, cells, shown: frame and state that it shows}
  }

  show(at) {
    while (this.blocks.length < this.run.groups.length) this.#add();
    this.run.groups.forEach((group, index) => {
      const frame = groupFrame(this.run, group, at);
      const block = this.blocks[index];
      block.item.hidden = frame === null;
      // Rejected tokens leave with the next picture; until then they can be seen.
      const isCurrent = frame !== null && frame === this.run.frames[at];
      if (frame !== null) this.#update(block, group, index, frame, isCurrent);
      block.item.classList.toggle("current", isCurrent);
      if (isCurrent) keepInSight(this.list, block.item);
    });
  }

  #add() {
    const head = element("p", { class: "block-head" });
    const cells = element("div", { class: "cells", "aria-hidden": "true" });
    const item = element("li", { class: "block" }, head, cells);
    this.blocks.push({ item, head, cells, frame: null, wasCurrent: false });
    this.list.append(item);
  }

  #update(block, group, index, frame, isCurrent) {
    if (block.frame === frame && block.wasCurrent === isCurrent) return;
    block.frame = frame;
    block.wasCurrent = isCurrent;
    block.head.textContent = headline(this.run, group, index, frame);
    while (block.cells.childElementCount < frame.shown) block.cells.append(emptyCell());
    [...block.cells.children].forEach((cell, at) => {
      cell.hidden = at >= frame.shown || isGone(frame.cells[at], isCurrent);
      if (!cell.hidden) fill(cell, frame.cells[at], isNew(group, frame, at, isCurrent));
    });
  }
}

function isGone(cell, isCurrent) {
  return cell.status === "dropped" || (cell.status === "rejected" && !isCurrent);
}

function isNew(group, frame, at, isCurrent) {
  if (!isCurrent) return false;
  if (group.kind === "plain") return at >= frame.shown - frame.filled;
  const { status, isNew } = frame.cells[at];
  return isNew ?? status === "own";
}

function headline(run, group, index, frame) {
  if (group.kind === "plain") {
    const isFirst = index === 0 && run.request.mode === "speculative" && frame.shown === 1;
    return isFirst ? "First token, from prefill" : `Token by token: ${frame.shown}`;
  }
  const name = `Block ${blockNumber(run, index)}`;
  const taken = frame.step === 0 ? "1 pass" : `${frame.step + 1} passes`;
  const masked = frame.cells.filter((cell) => cell.status === "masked").length;
  const rest = masked === 0 ? "whole" : `${masked} blank`;
  if (frame.kind === "step") return `${name}: ${taken}, ${rest}`;
  const count = (status) => frame.cells.filter((cell) => cell.status === status).length;
  const [kept, rejected] = [count("kept"), count("rejected")];
  const stands = kept + count("own");
  if (run.request.mode === "speculative") return `${name}: ${taken}, ${kept} drafts kept`;
  return `${name}: ${taken}, ${rejected ? `${stands} kept, ${rejected} rejected` : "read"}`;
}

function emptyCell() {
  const text = element("span", { class: "cell-text" });
  const order = element("span", { class: "cell-order" });
  return element("span", { class: "cell" }, order, text);
}

function fill(item, cell, isNewCell) {
  const [order, text] = item.children;
  item.dataset.status = cell.status;
  item.dataset.band = cell.confidence === null ? "" : bandOf(cell.confidence);
  item.dataset.order = cell.order === null ? "" : orderShade(cell.order);
  item.classList.toggle("new", isNewCell);
  order.textContent = cell.order ?? "";
  item.classList.toggle("long", cell.text.length > 6);
  text.replaceChildren(...visible(cell.text));
  item.title = titleOfCell(cell);
}

function titleOfCell(cell) {
  if (cell.status === "masked") return "blank";
  const parts = [JSON.stringify(cell.text)];
  if (cell.confidence !== null) parts.push(`${(cell.confidence * 100).toFixed(1)} % sure`);
  if (cell.order !== null) parts.push(`pass ${cell.order}`);
  if (cell.status === "own") parts.push("the context tower's own");
  if (cell.status === "copied") parts.push("copied from the text before, verified");
  if (cell.status === "rejected") parts.push("rejected by the context tower");
  return parts.join(", ");
}

// Whitespace and parts of characters would be invisible in a cell: marks stand for them.
const MARKS = { " ": "\u00b7", "\n": "\u21b5", "\t": "\u2192", "\ufffd": "\u25cc" };

function visible(text) {
  return [...text].map((sign) =>
    MARKS[sign] ? element("i", {}, MARKS[sign]) : document.createTextNode(sign),
  );
}

/** Scroll inside the list alone, never the page. */
function keepInSight(list, item) {
  const top = item.offsetTop - list.offsetTop;
  if (top < list.scrollTop) list.scrollTop = top;
  const bottom = top + item.offsetHeight;
  if (bottom > list.scrollTop + list.clientHeight) list.scrollTop = bottom - list.clientHeight;
}
