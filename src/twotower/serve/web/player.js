// Playback: which moment is on the screen, and when the next one follows.

const MAX_LAG_MS = 100;

/** Steps through moments in time. It draws nothing: `show(k)` and `change()` are told. */
export class Player {
  /** source: {count(), stay(k): ms, isOver()}; show(k) draws; change() follows play and pause. */
  constructor(source, show, change) {
    this.source = source;
    this.show = show;
    this.change = change;
    this.at = 0;
    this.isPlaying = false;
    this.due = 0; // time of the clock at which the next moment is to be shown
    this.request = 0;
  }

  get isAtEnd() {
    return this.at >= this.source.count() - 1;
  }

  play() {
    if (this.isAtEnd && this.source.isOver()) this.#go(0);
    this.isPlaying = true;
    this.due = performance.now() + this.source.stay(this.at);
    this.change();
    this.#ask();
  }

  pause() {
    this.isPlaying = false;
    cancelAnimationFrame(this.request);
    this.change();
  }

  /** Go to a moment by hand, which pauses. */
  seek(k) {
    if (this.isPlaying) this.pause();
    this.#go(Math.min(Math.max(k, 0), this.source.count() - 1));
  }

  /** Go to the newest moment without playing: for live runs where motion is not wanted. */
  follow() {
    this.#go(this.source.count() - 1);
  }

  #go(k) {
    this.at = k;
    this.show(k);
  }

  #ask() {
    this.request = requestAnimationFrame((now) => this.#tick(now));
  }

  #tick(now) {
    if (!this.isPlaying) return;
    // Where drawing stood still (a hidden tab, a busy machine), playback goes on from there.
    this.due = Math.max(this.due, now - MAX_LAG_MS);
    let next = this.at;
    const last = this.source.count() - 1;
    while (next < last && now >= this.due) {
      next += 1;
      this.due += this.source.stay(next);
    }
    // A live run that is slower than the playback: the clock waits for what arrives.
    if (next === last) this.due = Math.max(this.due, now);
    if (next !== this.at) this.#go(next);
    if (next === last && this.source.isOver()) this.pause();
    else this.#ask();
  }
}
