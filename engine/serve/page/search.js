// The page: a form that asks for searches, a card for each that follows it, and what the machine does.

import { curve, pulse, short } from "./chart.js";
import { Refused, follow } from "./events.js";

const $ = id => document.getElementById(id);
const LOOK = 1000; // milliseconds between looks at the machine
const LOOKS = 120;
const PREVIEW = 250; // milliseconds between pictures of a search that runs, at least
const OPEN = ["queued", "running"];
let served = null;

function headers(more = {}) {
  const key = $("key").value || sessionStorage.getItem("key");
  return key ? { ...more, Authorization: `Bearer ${key}` } : more;
}

/** What the server answers, as JSON; throws `Refused`. */
async function ask(path, options = {}) {
  const answer = await fetch(path, { ...options, headers: headers(options.headers) });
  const body = await answer.json();
  if (answer.status === 401) $("locked").hidden = false;
  if (!answer.ok) throw new Refused(body);
  return body;
}

// The form.

async function describe() {
  served = await ask("/v1/options");
  $("model").textContent = served.model;
  $("rewards").replaceChildren(...served.rewards.map(name => new Option(name, name)));
  $("method").replaceChildren(...Object.keys(served.methods).map(name => new Option(name, name)));
  $("reward").value = served.defaults.reward;
  $("method").value = served.defaults.method;
  $("nfe").value = served.defaults.nfe;
  $("nfe").max = served.limits.nfe;
  $("n").max = served.limits.n;
  $("prompt").maxLength = served.limits.prompt;
  describeMethod();
}

function describeMethod() {
  const own = Object.entries(served.methods[$("method").value]).map(([name, { default: usual, help }]) => {
    const label = document.createElement("label"), input = document.createElement("input"), small = document.createElement("small");
    label.append(name, input, small);
    input.name = name;
    input.placeholder = usual ?? "the method's choice";
    small.textContent = help;
    return label;
  });
  $("own").replaceChildren(...own);
  document.querySelector("details").hidden = !own.length;
}

/** A text as the number or the switch that it stands for. */
function value(text) {
  if (text === "true" || text === "false") return text === "true";
  return text.trim() !== "" && Number.isFinite(Number(text)) ? Number(text) : text;
}

function asked() {
  const body = { prompt: $("prompt").value };
  for (const name of ["reward", "method", "nfe", "stop_at"]) if ($(name).value !== "") body[name] = value($(name).value);
  for (const input of $("own").querySelectorAll("input")) if (input.value !== "") body[input.name] = value(input.value);
  return body;
}

async function submit(event) {
  event.preventDefault();
  $("error").textContent = "";
  $("go").disabled = true;
  try {
    if ($("key").value) sessionStorage.setItem("key", $("key").value);
    if (!served) await describe();
    const body = asked(), seed = Number($("seed").value || 0), count = Number($("n").value || 1);
    for (let i = count - 1; i >= 0; i--) {
      const search = await ask("/v1/searches", {
        method: "POST", body: JSON.stringify({ ...body, seed: seed + i }),
        headers: { "Content-Type": "application/json" },
      });
      show(search);
    }
  } catch (error) {
    $("error").textContent = error.message;
  } finally {
    $("go").disabled = false;
  }
}

// The cards.

function show(search) {
  const card = $("card").content.cloneNode(true).firstElementChild;
  const part = name => card.querySelector(name);
  const { id, budget } = search, points = [];
  let nfe = 0, state = search.status, looking = false, stale = false, dropped = false, url = null;
  card.id = id;
  part("h2").textContent = search.request.prompt;
  part(".budget").textContent = budget ? `of ${short(budget)} NFE` : "NFE";
  part(".seed").textContent = search.request.seed;
  $("empty")?.remove();
  $("searches").prepend(card);

  function draw() {
    card.dataset.state = state;
    part(".state").textContent = { queued: "waiting", running: "searching" }[state] ?? state;
    part(".reward").textContent = points.length ? short(points.at(-1)[1]) : "–";
    part(".spent").textContent = short(nfe);
    part("progress").value = OPEN.includes(state) ? (budget ? Math.min(1, nfe / budget) : 0) : 1;
    part(".accept").disabled = !OPEN.includes(state) || !points.length;
    part(".cancel").disabled = !OPEN.includes(state);
    curve(part(".curve"), points, nfe, budget);
  }

  /** Fetches the best image so far; one at a time, and the last one always. */
  async function look() {
    stale = true;
    if (looking) return;
    looking = true;
    while (stale && !dropped) {
      stale = false;
      const answer = await fetch(`/v1/searches/${id}/image`, { headers: headers() }).catch(() => null);
      if (answer?.ok) {
        const before = url, image = part("img");
        url = URL.createObjectURL(await answer.blob());
        image.src = url;
        await image.decode().catch(() => null);
        image.hidden = false;
        image.alt = search.request.prompt;
        image.classList.toggle("small", image.naturalWidth < 200);
        part(".save").href = url;
        if (before) URL.revokeObjectURL(before);
      }
      if (OPEN.includes(state)) await new Promise(done => setTimeout(done, PREVIEW));
    }
    looking = false;
  }

  function told(name, data) {
    state = data.status;
    if (name === "search.improved") {
      nfe = data.nfe;
      points.push([data.nfe, data.best_reward]);
      look();
    } else if (name === "search.progress") {
      nfe = data.nfe;
    } else {
      end(data);
      return true;
    }
    draw();
    return false;
  }

  function end(found) {
    nfe = found.result?.nfe ?? found.progress.nfe;
    points.splice(0, points.length, ...found.improvements.map(one => [one.nfe, one.reward]));
    if (state === "cancelled" && found.result && !dropped) state = "accepted";
    draw();
    if (found.result) {
      part(".reward").textContent = short(found.result.reward);
      part(".save").hidden = false;
      part(".save").download = `${id}.${found.result.format}`;
      look();
    }
    if (state === "failed") part(".why").textContent = found.error?.message ?? "it failed";
  }

  const stop = () => ask(`/v1/searches/${id}`, { method: "DELETE" }).catch(error => {
    part(".why").textContent = error.message;
  });
  part(".accept").addEventListener("click", stop);
  part(".cancel").addEventListener("click", () => {
    dropped = true;
    stop();
  });
  draw();
  follow(`/v1/searches/${id}/events?every=1`, headers(), told).catch(error => {
    part(".why").textContent = error.message;
  });
}

// The machine.

const rates = [];

async function watch() {
  try {
    if (!$("locked").hidden && !headers().Authorization) throw new Refused(null); // nothing to ask with yet
    const now = await ask("/v1/stats");
    $("rate").textContent = short(Math.round(now.nfe_per_second));
    $("occupancy").textContent = `${Math.round(100 * now.occupancy)} %`;
    $("running").textContent = now.running;
    $("waiting").textContent = now.waiting;
    $("free").textContent = now.slots ? short(now.free_slots) : "–"; // they are made for the first search
    const alive = now.workers.filter(one => one.alive).length;
    $("workers").textContent = now.draining ? "draining" : `${alive} of ${now.workers.length}`;
    rates.push(now.nfe_per_second);
    if (rates.length > LOOKS) rates.shift();
    pulse($("pulse"), rates, LOOKS);
  } catch (error) {
    $("workers").textContent = "no answer";
  }
  setTimeout(watch, LOOK);
}

$("form").addEventListener("submit", submit);
$("method").addEventListener("change", describeMethod);
$("prompt").addEventListener("keydown", event => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
});
describe().catch(error => {
  $("error").textContent = error.message;
});
watch();
