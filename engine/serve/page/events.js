// Server-sent events over fetch, which unlike EventSource can send a key; a lost connection goes on where it was.

const PAUSE = 500; // milliseconds before the first new try; doubles up to LONGEST
const LONGEST = 8000;

/** Calls `told(name, data)` for each event until it returns true; throws what the server answers in place of events. */
export async function follow(path, headers, told, signal) {
  let last = null, pause = PAUSE;
  for (;;) {
    try {
      const given = last === null ? headers : { ...headers, "Last-Event-ID": last };
      const answer = await fetch(path, { headers: given, signal });
      if (!answer.ok) throw new Refused(await answer.json());
      for await (const event of events(answer.body)) {
        pause = PAUSE;
        last = event.id ?? last;
        if (told(event.name, event.data)) return;
      }
    } catch (error) {
      if (error instanceof Refused || signal?.aborted) throw error;
    }
    await new Promise(done => setTimeout(done, pause));
    pause = Math.min(LONGEST, 2 * pause);
  }
}

/** What the server refused, with its message. */
export class Refused extends Error {
  constructor(body) {
    super(body?.error?.message ?? "the server refused");
  }
}

async function* events(body) {
  const reader = body.getReader(), decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += decoder.decode(value, { stream: true });
    for (let end; (end = rest.indexOf("\n\n")) >= 0; rest = rest.slice(end + 2)) {
      const lines = rest.slice(0, end).split("\n");
      const field = name => lines.find(line => line.startsWith(`${name}: `))?.slice(name.length + 2);
      if (field("data") !== undefined)
        yield { id: field("id"), name: field("event") ?? "message", data: JSON.parse(field("data")) };
    }
  }
}
