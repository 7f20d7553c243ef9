// Two charts as inline SVG: the best reward against NFE, and a rate over time.

const SPACE = "http://www.w3.org/2000/svg";

/** Draws steps through `points`, [[nfe, reward], ...], up to `now` NFE of `budget`. */
export function curve(svg, points, now, budget) {
  const width = svg.clientWidth || 260, height = svg.clientHeight || 128;
  const left = 44, right = 10, top = 10, bottom = 22;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const most = Math.max(budget || 0, now, 1);
  const rewards = points.map(point => point[1]);
  let low = Math.min(...rewards), high = Math.max(...rewards);
  if (!rewards.length) [low, high] = [0, 1];
  if (high === low) [low, high] = [low - 0.5, high + 0.5];
  const x = nfe => left + (width - left - right) * nfe / most;
  const y = reward => top + (height - top - bottom) * (high - reward) / (high - low);
  const parts = [
    line("axis", left, height - bottom, width - right, height - bottom), line("axis", left, top, left, height - bottom),
    text(left, height - 5, "0", "start"), text(width - right, height - 5, `${most} NFE`, "end"),
  ];
  if (rewards.length) {
    parts.push(text(left - 6, y(high) + 4, short(high), "end"), text(left - 6, y(low) + 4, short(low), "end"));
    let path = `M${x(points[0][0])},${y(points[0][1])}`;
    for (const [nfe, reward] of points.slice(1)) path += `H${x(nfe)}V${y(reward)}`;
    const end = x(Math.max(now, points.at(-1)[0]));
    path += `H${end}`;
    const floor = height - bottom;
    parts.push(element("path", { class: "area", d: `${path}V${floor}H${x(points[0][0])}Z` }));
    parts.push(element("path", { class: "best", d: path }));
    parts.push(element("circle", { class: "now", cx: end, cy: y(rewards.at(-1)), r: 3.5 }));
  }
  svg.replaceChildren(...parts);
}

/** Draws a rate of the last `most` looks. */
export function pulse(svg, rates, most) {
  const width = svg.clientWidth || 190, height = svg.clientHeight || 48;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const high = Math.max(...rates, 1);
  const points = rates.map((rate, i) => [width * (most - rates.length + i + 1) / most, height - 2 - (height - 6) * rate / high]);
  const path = points.map(([x, y]) => `${x},${y}`).join("L");
  const parts = [line("axis", 0, height - 1, width, height - 1)];
  if (points.length > 1) {
    parts.push(element("path", { class: "area", d: `M${points[0][0]},${height - 1}L${path}V${height - 1}Z` }));
    parts.push(element("path", { class: "best", d: `M${path}` }));
  }
  svg.replaceChildren(...parts);
}

/** A number as a person reads it. */
export function short(value) {
  if (value === null || value === undefined) return "–";
  return Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(4)));
}

function element(name, attributes, words) {
  const made = document.createElementNS(SPACE, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (words !== undefined) made.textContent = words;
  return made;
}

function line(kind, x1, y1, x2, y2) {
  return element("line", { class: kind, x1, y1, x2, y2 });
}

function text(x, y, words, anchor) {
  return element("text", { x, y, "text-anchor": anchor }, words);
}
