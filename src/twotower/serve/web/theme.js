// Dark or light: the system's choice until the switch says otherwise; the choice is remembered.

const STORE = "twotower.theme";

/** Wire the switch: a button that turns to the other of the two themes. */
export function startTheme(button) {
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const chosen = () => document.documentElement.dataset.theme ?? (dark.matches ? "dark" : "light");
  const stored = readStore();
  if (stored === "dark" || stored === "light") document.documentElement.dataset.theme = stored;
  const label = () => {
    const other = chosen() === "dark" ? "light" : "dark";
    button.setAttribute("aria-label", `Switch to ${other} colours`);
    button.title = `Switch to ${other} colours`;
    button.dataset.shows = other;
  };
  button.addEventListener("click", () => {
    const other = chosen() === "dark" ? "light" : "dark";
    document.documentElement.dataset.theme = other;
    writeStore(other);
    label();
  });
  dark.addEventListener("change", label);
  label();
}

// A browser may refuse storage (private windows, blocked site data): the switch still works.
function readStore() {
  try {
    return window.localStorage.getItem(STORE);
  } catch {
    return null;
  }
}

function writeStore(theme) {
  try {
    window.localStorage.setItem(STORE, theme);
  } catch {
    // Not remembered; nothing else depends on it.
  }
}
