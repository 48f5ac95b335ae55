// One decoding as data: the server's events become frames, one for each picture that can be shown.
// Nothing here touches the document, so a run is the same live, played back, shared or exported.

/** Which blocks a run has and what each looked like, frame by frame. */
export class Run {
  constructor(request) {
    this.request = request;
    this.events = [];
    this.notice = null; // why the model cannot be expected to answer
    this.frames = [startFrame(request.mode === "speculative" ? 0 : null)];
    this.groups = []; // {kind: "block" | "plain", block, frames: [frame number], cells}
    this.text = "";
    this.usage = null;
    this.finishReason = null;
    this.state = "waiting"; // then streaming, then finished, stopped or failed
    this.error = null;
  }

  get isOver() {
    return ["finished", "stopped", "failed"].includes(this.state);
  }

  get last() {
    return this.frames[this.frames.length - 1];
  }

  /** Take one event of the stream, of any kind. */
  take(event) {
    this.state = "streaming";
    this.events.push(event);
    if (event.object === "twotower.step") this.#takeStep(event);
    else if (event.object === "twotower.commit") this.#takeCommit(event);
    else this.#takeChunk(event);
  }

  end(state, error = null) {
    this.state = state;
    this.error = error;
  }

  #takeStep(event) {
    const group = this.#groupOfStep(event);
    const before = this.last;
    const cells = filledCells(group.cells, event);
    group.cells = cells;
    this.#push(group, {
      ...before,
      kind: "step",
      cells,
      shown: cells.length,
      step: event.step,
      t: event.elapsed_ms,
      nfe: event.nfe,
      filled: cells.filter((cell) => cell.isNew && cell.status === "filled").length,
    });
  }

  #takeCommit(event) {
    this.notice ??= event.notice ?? null;
    const group = this.#groupOfCommit(event);
    const before = this.last;
    // Tokens written one by one share a list that grows; a frame notes how many of it it shows.
    const cells = group.kind === "block" ? settledCells(group.cells, event) : group.cells;
    if (group.kind === "plain") cells.push(...plainCells(event));
    group.cells = cells;
    this.#push(group, {
      ...before,
      kind: "commit",
      cells,
      shown: cells.length,
      t: event.elapsed_ms,
      nfe: event.nfe,
      contextForwards: event.context_forwards,
      tokens: before.tokens + event.tokens.length,
      filled: group.kind === "plain" ? event.tokens.length : 0,
      textLength: this.text.length,
      accepted: sum(before.accepted, event.accepted),
      rejected: sum(before.rejected, rejectedBy(event)),
    });
  }

  #takeChunk(event) {
    const choice = event.choices?.[0];
    if (choice?.text) {
      this.text += choice.text;
      // Text comes beside its commit: it belongs to the picture of that commit, or to the next one.
      if (this.last.kind === "commit") this.last.textLength = this.text.length;
    }
    if (choice?.finish_reason) {
      this.finishReason = choice.finish_reason;
      this.#dropBehindEnd();
    }
    if (event.usage) this.usage = event.usage;
  }

  /** What the last block held behind the end of the text was never to be text: not rejected. */
  #dropBehindEnd() {
    const { last } = this;
    if (last.kind !== "commit" || this.groups[last.group].kind !== "block") return;
    last.cells = last.cells.map((cell) =>
      cell.status === "rejected" ? { ...cell, status: "dropped" } : cell,
    );
    this.groups[last.group].cells = last.cells;
    last.rejected = this.frames[this.frames.length - 2].rejected;
  }

  #push(group, frame) {
    const number = this.frames.length;
    group.frames.push(number);
    this.frames.push({ ...frame, group: this.groups.indexOf(group) });
  }

  #groupOfStep(event) {
    const last = this.groups[this.groups.length - 1];
    if (last?.kind === "block" && last.block === event.block) return last;
    return this.#open({ kind: "block", block: event.block, frames: [], cells: [] });
  }

  #groupOfCommit(event) {
    const last = this.groups[this.groups.length - 1];
    if (last?.kind === "block" && last.block === event.block) return last;
    if (last?.kind === "plain") return last;
    return this.#open({ kind: "plain", block: event.block, frames: [], cells: [] });
  }

  #open(group) {
    this.groups.push(group);
    return group;
  }
}

/** `drafts`: how many draft tokens there are so far, null for a mode that has none. */
function startFrame(drafts) {
  return {
    kind: "start",
    group: -1,
    cells: [],
    shown: 0,
    step: 0,
    t: 0,
    nfe: 0,
    contextForwards: 0,
    tokens: 0,
    filled: 0,
    textLength: 0,
    accepted: drafts,
    rejected: drafts,
  };
}

function sum(total, count) {
  return count === null || count === undefined ? total : (total ?? 0) + count;
}

/**
 * Draft tokens of a commit that the context tower read and did not choose. Where all that was
 * committed is draft, the text ended inside it: what lay behind the end was not judged.
 */
function rejectedBy(event) {
  if (event.drafted === null || event.drafted === undefined) return null;
  return event.accepted === event.tokens.length ? 0 : event.drafted - event.accepted;
}

const BLANK = { status: "masked", id: null, text: "", confidence: null, order: null };

/** The cells after a denoiser pass; `order` is the pass of the block that filled a cell, from 1. */
function filledCells(before, event) {
  return event.tokens.map((token, at) => {
    const old = before[at];
    if (token.masked) return { ...BLANK };
    const isNew = !old || old.status === "masked" || old.id !== token.id;
    if (token.confidence === null) return { ...ownCell(token), isNew };
    return {
      status: "filled",
      id: token.id,
      text: token.text,
      confidence: token.confidence,
      order: isNew ? event.step + 1 : old.order,
      isNew,
    };
  });
}

/**
 * The cells of a block once it is text. A draft token stands where the context tower chose the
 * same one; behind the last of those comes the tower's own token; what it read beyond is rejected.
 * So are the last tokens of a block that verification rejects, unless the text ended before them.
 */
function settledCells(before, event) {
  const isDraft = event.drafted !== null && event.drafted !== undefined;
  const read = isDraft ? event.drafted : before.length;
  const stands = (token, at) => at < read && before[at]?.id === token.id;
  const isCut = event.tokens.every(stands); // the text ended inside the block or draft
  const size = Math.max(before.length, event.tokens.length);
  const isCutShort = event.rejected && event.tokens.length + event.rejected === size;
  return Array.from({ length: size }, (_, at) => {
    const token = event.tokens[at];
    if (token && stands(token, at)) return { ...before[at], ...settled(before[at]) };
    if (token) return ownCell(token);
    const isRejected = isCutShort || (isDraft && at < read && !isCut);
    return { ...before[at], status: isRejected ? "rejected" : "dropped", isNew: false };
  });
}

/** A cell that became text: the denoiser's is kept, the context tower's own stays so. */
function settled(cell) {
  return { status: cell.status === "own" ? "own" : "kept", isNew: false };
}

/**
 * The cells of a commit without a denoiser pass: tokens copied from the text before, as far as the
 * context tower chose the same, and its own behind them.
 */
function plainCells(event) {
  const copied = event.drafter === "lookup" ? event.accepted : 0;
  return event.tokens.map((token, at) =>
    at < copied ? { ...ownCell(token), status: "copied" } : ownCell(token),
  );
}

/** A token that the context tower wrote itself. */
function ownCell(token) {
  return { status: "own", id: token.id, text: token.text, confidence: null, order: null };
}

/** What the group shows at frame `at` of the run: its newest frame until then, or null. */
export function groupFrame(run, group, at) {
  let low = 0;
  let high = group.frames.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (group.frames[middle] <= at) low = middle + 1;
    else high = middle;
  }
  return low === 0 ? null : run.frames[group.frames[low - 1]];
}

/** Running figures at a frame. Rates are null while there is nothing to divide by. */
export function figures(frame) {
  const seconds = frame.t / 1000;
  return {
    tokens: frame.tokens,
    seconds,
    tokensPerSecond: seconds > 0 && frame.tokens > 0 ? frame.tokens / seconds : null,
    nfe: frame.nfe,
    tokensPerNfe: frame.nfe > 0 ? frame.tokens / frame.nfe : null,
    contextForwards: frame.contextForwards,
    accepted: frame.accepted,
    rejected: frame.rejected,
  };
}
