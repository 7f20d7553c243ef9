// /openapi.json as a page, without anything from elsewhere.

function make(name, words, ...children) {
  const made = document.createElement(name);
  if (words) made.textContent = words;
  made.append(...children);
  return made;
}

function row(name, schema, required) {
  const kind = schema.enum ? schema.enum.join(" | ") : [schema.type].flat().join(" | ");
  const usual = schema.default === undefined ? "" : `default ${JSON.stringify(schema.default)}`;
  const most = schema.maximum === undefined ? "" : `at most ${schema.maximum}`;
  const about = [required ? "required" : "", usual, most, schema.description ?? ""].filter(Boolean).join("; ");
  return make("tr", "", make("td", "", make("code", name)), make("td", kind), make("td", about));
}

function endpoint(path, method, about) {
  const place = make("code", "", make("b", method.toUpperCase()), ` ${path}`);
  const found = make("section", "", make("h2", "", place), make("p", about.description ?? about.summary));
  found.className = "endpoint";
  const rows = (about.parameters ?? []).map(one => row(`${one.name} (${one.in})`, { ...one.schema, ...one }, one.required));
  const schema = about.requestBody?.content?.["application/json"]?.schema;
  for (const [name, one] of Object.entries(schema?.properties ?? {}))
    rows.push(row(name, one, schema.required?.includes(name)));
  if (rows.length) found.append(make("table", "", make("tbody", "", ...rows)));
  if (schema?.description) found.append(make("p", schema.description));
  return found;
}

const told = await (await fetch("/openapi.json")).json();
const sections = Object.entries(told.paths).flatMap(([path, methods]) =>
  Object.entries(methods).map(([method, about]) => endpoint(path, method, about)));
document.getElementById("docs").replaceChildren(make("p", told.info.description), ...sections);
