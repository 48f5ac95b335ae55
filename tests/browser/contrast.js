// Text on the page with too little contrast (WCAG 2.2, 1.4.3), as lines that name it.
() => {
  // Any CSS colour as [red, green, blue, alpha], by letting the browser paint it.
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const parse = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = (top, below) => {
    const part = (at) => top[at] * top[3] + below[at] * (1 - top[3]);
    return [part(0), part(1), part(2), 1];
  };
  const behind = (one) => {
    const layers = [];
    for (let at = one; at; at = at.parentElement) layers.push(parse(getComputedStyle(at).backgroundColor));
    return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255, 1]);
  };
  const light = ([r, g, b]) => {
    const linear = (part) => {
      const share = part / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    };
    return 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  };
  const opacity = (one) => {
    let share = 1;
    for (let at = one; at; at = at.parentElement) share *= Number(getComputedStyle(at).opacity);
    return share;
  };
  const ratio = (one) => {
    const back = behind(one);
    const ink = parse(getComputedStyle(one).color);
    const shown = over([ink[0], ink[1], ink[2], ink[3] * opacity(one)], back);
    const [low, high] = [light(shown), light(back)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const hasText = (one) => [...one.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
  const isSeen = (one) => one.checkVisibility() && !one.closest(".unseen, .skip, :disabled, noscript");
  const faint = [];
  for (const one of document.querySelectorAll("body *")) {
    const isField = one.matches("input:not([type=radio]):not([type=range]), textarea, select");
    if (!isSeen(one) || !(isField || hasText(one))) continue;
    const style = getComputedStyle(one);
    const size = Number.parseFloat(style.fontSize);
    const isLarge = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    const found = ratio(one);
    if (found < (isLarge ? 3 : 4.5)) faint.push(`${one.tagName}.${one.className} ${found.toFixed(2)}: ${one.textContent.slice(0, 30)}`);
  }
  return [...new Set(faint)];
}
