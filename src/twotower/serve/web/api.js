// The server as the page sees it: the model's facts, one run as a stream, faults as sentences.
// Only this file makes requests; all go to where the page came from.

const BROKEN = "The connection broke off before the end. What arrived is kept below.";

/** A fault in words for people. `kind` says what the page may offer: a wait, the key field. */
export class Fault extends Error {
  constructor(kind, message, retryAfter = null) {
    super(message);
    this.kind = kind; // "unreachable" | "key" | "busy" | "stopped" | "input" | "broken" | "server"
    this.retryAfter = retryAfter; // seconds, or null
  }
}

/** {id, modes, defaults, about} of the model that is served. Throws Fault. */
export async function fetchModel(key) {
  const response = await send("v1/models", { headers: headers(key) });
  const listing = await readJson(response);
  const model = listing?.data?.[0];
  if (!model) throw new Fault("server", "The server names no model. Is this a twotower server?");
  const facts = model.twotower ?? {};
  return {
    id: model.id,
    modes: facts.modes ?? ["diffusion", "speculative", "ar"],
    defaults: facts.defaults ?? {},
    about: facts.about ?? "",
  };
}

/**
 * Send `request` and hand each event of the answer to `take`, until its end. Throws Fault;
 * an abort through `signal` throws the browser's AbortError.
 */
export async function streamRun(request, key, signal, take) {
  const response = await send("v1/completions", {
    method: "POST",
    headers: { ...headers(key), "Content-Type": "application/json" },
    body: JSON.stringify({
      ...request,
      stream: true,
      stream_options: { include_usage: true },
      twotower_events: true,
    }),
    signal,
  });
  let isDone = false;
  for await (const data of eventData(response.body)) {
    if (data === "[DONE]") {
      isDone = true;
      break;
    }
    const event = JSON.parse(data);
    if (event.error) throw faultOfStream(event.error);
    take(event);
  }
  if (!isDone) {
    throw new Fault("broken", BROKEN);
  }
}

async function send(path, init) {
  let response;
  try {
    response = await fetch(path, { ...init, cache: "no-store", credentials: "omit" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Fault("unreachable", "The server cannot be reached. Is it still running?");
  }
  if (!response.ok) throw await faultOfResponse(response);
  return response;
}

function headers(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function readJson(response) {
  try {
    return await response.json();
  } catch {
    throw new Fault("server", "The server's answer is not JSON. Is this a twotower server?");
  }
}

/** The `data:` payloads of a server-sent event stream. Throws Fault when the connection breaks. */
async function* eventData(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let lines = [];
  for (;;) {
    const { value, done } = await readChunk(reader);
    if (done) return;
    const parts = (rest + value).split(/\r?\n/);
    rest = parts.pop();
    for (const line of parts) {
      if (line.startsWith("data:")) lines.push(line.slice(5).replace(/^ /, ""));
      if (line !== "" || lines.length === 0) continue;
      yield lines.join("\n");
      lines = [];
    }
  }
}

async function readChunk(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Fault("broken", BROKEN);
  }
}

/** A refused request as a sentence, with the server's own line where it helps. */
export async function faultOfResponse(response) {
  const error = await errorOf(response);
  const wait = Number.parseFloat(response.headers.get("Retry-After") ?? "");
  const retryAfter = Number.isFinite(wait) ? Math.max(1, Math.ceil(wait)) : null;
  switch (response.status) {
    case 401:
      return new Fault("key", "The server wants an API key. Enter it and run again.");
    case 404:
      return new Fault("server", because("The server does not know this address or model", error));
    case 413:
      return new Fault("input", because("The request is too large for this server", error));
    case 429:
      return new Fault("busy", busySentence(error), retryAfter ?? 1);
    case 503:
      return new Fault("stopped", "The server is stopping and takes no new requests.", retryAfter);
    default:
      return response.status < 500
        ? new Fault("input", because("The server did not accept the request", error))
        : new Fault("server", because(`The server failed with status ${response.status}`, error));
  }
}

/** The `error` of an answer in OpenAI's shape; empty when the answer has another one. */
async function errorOf(response) {
  try {
    return (await response.json())?.error ?? {};
  } catch {
    return {};
  }
}

function busySentence(error) {
  return error.code === "queue_full"
    ? "The server is busy: too many requests are waiting."
    : because("The server asks you to slow down", error);
}

function faultOfStream(error) {
  if (error.code === "stopped") return new Fault("stopped", "The server stopped before the end.");
  const what = error.code === "deadline" ? "The run took too long" : "The run ended early";
  return new Fault("server", because(what, error));
}

/** `what` as a sentence, with the server's own line behind a colon if there is one. */
function because(what, error) {
  const line = String(error.message ?? "").trim();
  if (line === "") return `${what}.`;
  return `${what}: ${line}${/[.!?]$/.test(line) ? "" : "."}`;
}
