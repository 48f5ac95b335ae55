// A run as a file: everything that the page knows about it, so that others can look again.

/** The exported object: requests without the API key, every event of the stream, results. */
export function toExport(runs, model) {
  return {
    format: "twotower.run",
    version: 1,
    exported_at: new Date().toISOString(),
    model: model?.id ?? null,
    runs: runs.map((run) => ({
      request: run.request,
      state: run.state,
      error: run.error,
      finish_reason: run.finishReason,
      text: run.text,
      usage: run.usage,
      events: run.events,
    })),
  };
}

/** Hand `content` to the browser as a file to save. */
export function saveFile(name, content) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([content], { type: "application/json" }));
  link.download = name;
  link.click();
  // Browsers read the file after the click has returned.
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
